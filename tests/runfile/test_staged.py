from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptdiff.errors import RunFileError
from ckptdiff.runfile.staged import StagedFile

OFFSETS, SIZES = st.integers(0, 300), st.integers(1, 300)
STEPS = st.tuples(st.sampled_from(["write", "write", "write", "write", "read", "truncate"]), OFFSETS, SIZES)


def writes(file: StagedFile, offset: int, data: bytes) -> None:
    file.seek(offset)
    assert file.write(data) == len(data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=40))
def test_it_holds_what_an_ordinary_file_holds(tmp_path: Path, steps: list[tuple[str, int, int]]) -> None:
    file = StagedFile(tmp_path / "made")
    with (tmp_path / "plain").open("wb+") as plain:
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
    os.dup2(device, file._descriptor)
    os.close(device)


def test_a_full_disk_is_told_by_the_next_check(tmp_path: Path) -> None:
    file = StagedFile(tmp_path / "made")
    full(file)
    writes(file, 0, b"few")
    for tell in (file.check, file.commit):
        with pytest.raises(RunFileError, match="No space left on device") as caught:
            tell()
        assert "make room" in str(caught.value.hint)
    file.discard()
    assert not list(tmp_path.iterdir())


def test_an_interrupt_in_a_write_is_told_by_the_next_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught, StagedFile(tmp_path / "made") as file:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", interrupted)
            writes(file, 0, b"few")
        writes(file, 3, b"more")
        assert os.fstat(file._descriptor).st_size == 0
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
    file = StagedFile(tmp_path / "made")
    writes(file, 0, b"before")
    file.stop()
    writes(file, 6, b"after")
    file.seek(0)
    assert file.read(100) == b"before"
    file.discard()
