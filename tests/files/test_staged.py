from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptdiff.errors import RunFileError
from ckptdiff.files import staged
from ckptdiff.files.staged import StagedFile, StagedFolder
from ckptdiff.options import MaskRule
from ckptdiff.runfile.writer import RunFileWriter

OFFSETS, SIZES = st.integers(0, 300), st.integers(1, 300)
STEPS = st.tuples(st.sampled_from(["write", "write", "write", "write", "read", "truncate"]), OFFSETS, SIZES)


def writes(file: StagedFile, offset: int, data: bytes) -> None:
    file.seek(offset)
    assert file.write(data) == len(data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=40))
def test_it_holds_what_an_ordinary_file_holds(tmp_path: Path, steps: list[tuple[str, int, int]]) -> None:
    with StagedFile(tmp_path / "made") as file, (tmp_path / "plain").open("wb+") as plain:
        for i, (step, offset, size) in enumerate(steps):
            plain.seek(offset)
            if step == "write":
                data = bytes([i % 255 + 1]) * size
                plain.write(data)
                writes(file, offset, data)
            elif step == "read":
                buffer = bytearray(size)
                file.seek(offset)
                assert file.readinto(memoryview(buffer)) == size
                assert buffer == plain.read(size).ljust(size, b"\0")
            else:
                plain.truncate(offset)
                file.truncate(offset)
            assert file.seek(0, os.SEEK_END) == plain.seek(0, os.SEEK_END)
        file.commit()
    assert (tmp_path / "made").read_bytes() == (tmp_path / "plain").read_bytes()


def full(file: StagedFile) -> None:
    """Let every later write end on a full disk."""
    device = os.open("/dev/full", os.O_RDWR)
    os.dup2(device, file._hidden.descriptor)
    os.close(device)


def test_the_disk_begins_while_pieces_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(staged, "_write_back", lambda _, offset, size: asked.append((offset, size)))
    piece = os.urandom(1 << 16)
    with StagedFile(tmp_path / "made") as file:
        for place in range(320):
            writes(file, place << 16, piece)
        file.commit()
    assert asked == [(0, 8 << 20), (0, 16 << 20)]
    assert (tmp_path / "made").read_bytes() == 320 * piece


def test_a_full_disk_is_told_by_the_next_check(tmp_path: Path) -> None:
    with StagedFile(tmp_path / "made") as file:
        full(file)
        writes(file, 0, b"few")
        for tell in (file.check, file.commit):
            with pytest.raises(RunFileError, match="No space left on device") as caught:
                tell()
            assert "make room" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_in_a_write_is_told_by_the_next_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught, StagedFile(tmp_path / "made") as file:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", interrupted)
            writes(file, 0, b"few")
        writes(file, 3, b"more")
        assert os.fstat(file._hidden.descriptor).st_size == 0
        for tell in (file.check, file.commit):
            with pytest.raises(KeyboardInterrupt):
                tell()
        # What HDF5 makes of a write that left nothing does not hide the reason.
        raise RuntimeError("unable to read")
    assert caught.value is file.failure
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("wrong"), RunFileError("wrong")])
def test_an_error_before_the_commit_leaves_the_target_alone(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "made").write_bytes(b"before")
    with pytest.raises(type(error)), StagedFile(tmp_path / "made") as file:
        writes(file, 0, b"after")
        raise error
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("made", b"before")]


def test_nothing_is_written_after_a_stop(tmp_path: Path) -> None:
    with StagedFile(tmp_path / "made") as file:
        writes(file, 0, b"before")
        file.stop()
        writes(file, 6, b"after")
        file.seek(0)
        assert file.read(100) == b"before"


@pytest.mark.parametrize(
    "make", [StagedFile, StagedFolder, lambda target: RunFileWriter(target, rule=MaskRule("bitwise"), compare="bf16")]
)
def test_an_interrupt_on_the_way_in_leaves_nothing(make: Callable[[Path], Any], tmp_path: Path) -> None:
    """Python raises what a signal brings where a function begins and where one that is written in C has returned."""
    moment, functions = 0, ("__enter__", "_begin", "mkdir", "make_file", "make_folder", "_lock", "rename")
    while interrupted(functions, moment, lambda: enter(make(tmp_path / "made"))):
        assert not list(tmp_path.iterdir()), moment
        moment += 1
    assert moment >= 8


def enter(made: Any) -> None:
    with made:
        sys.setprofile(None)


@pytest.mark.parametrize("make", [StagedFile, StagedFolder])
def test_an_interrupt_of_a_commit_leaves_all_or_nothing(make: Callable[[Path], Any], tmp_path: Path) -> None:
    moment, found = 0, set()

    def write() -> None:
        with make(tmp_path / f"{moment}") as made:
            made.commit()

    while interrupted(("commit", "take_name", "rename", "_close", "sync_folder"), moment, write):
        found.add(tuple(path.name for path in tmp_path.iterdir() if path.name != f"{moment}"))
        for path in tmp_path.iterdir():
            path.rmdir() if path.is_dir() else path.unlink()
        moment += 1
    assert moment >= 5 and found == {()}


def interrupted(functions: Sequence[str], moment: int, work: Callable[[], None]) -> bool:
    """Do something, with an interrupt in one of the functions after so many others that might come; whether it came."""
    passed = 0

    def interrupt(frame: FrameType, event: str, arg: object) -> None:
        nonlocal passed
        # Not where Python imports: its lock would stay closed for every other thread of this process.
        ours = not frame.f_globals["__name__"].startswith("importlib.")
        if event in ("call", "c_return") and frame.f_code.co_name in functions and ours:
            passed += 1
            if passed > moment:
                raise KeyboardInterrupt

    try:
        sys.setprofile(interrupt)
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False
