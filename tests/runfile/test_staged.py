from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptdiff.errors import RunFileError
from ckptdiff.runfile.staged import StagedFile

PAGE, HELD = 1 << 16, 1 << 20
OFFSETS = st.one_of(st.integers(0, 300), st.integers(PAGE - 5, PAGE + 5), st.integers(0, 3 * HELD))
SIZES = st.one_of(st.integers(1, 300), st.integers(PAGE - 5, PAGE + 5), st.sampled_from([3 * PAGE, HELD + 1]))
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


def test_small_writes_wait_for_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, sizes = os.pwrite, []

    def counted(descriptor: int, data: memoryview, offset: int) -> int:
        sizes.append(len(data))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", counted)
    file = StagedFile(tmp_path / "made")
    for i in range(4 * HELD // 100):
        writes(file, 100 * i, bytes([i % 256]) * 100)
        assert sum(sizes) >= 100 * i - HELD
    file.commit()
    assert len(sizes) <= 4 * HELD // PAGE + 1
    assert (tmp_path / "made").read_bytes() == b"".join(bytes([i % 256]) * 100 for i in range(4 * HELD // 100))


def full(file: StagedFile) -> None:
    """Let every later write end on a full disk."""
    device = os.open("/dev/full", os.O_RDWR)
    os.dup2(device, file._descriptor)
    os.close(device)


def test_a_full_disk_is_told_at_the_latest_by_commit(tmp_path: Path) -> None:
    file = StagedFile(tmp_path / "made")
    full(file)
    writes(file, 0, b"few")
    file.check()
    with pytest.raises(RunFileError, match="No space left on device") as caught:
        file.commit()
    assert "make room" in str(caught.value.hint)
    file.discard()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_once_the_memory_is_used_up(tmp_path: Path) -> None:
    file = StagedFile(tmp_path / "made")
    full(file)
    for i in range(HELD // 100 + 1000):
        writes(file, 100 * i, b"x" * 100)
    with pytest.raises(RunFileError, match="No space left on device"):
        file.check()
    file.discard()


def test_nothing_is_written_after_a_stop(tmp_path: Path) -> None:
    file = StagedFile(tmp_path / "made")
    writes(file, 0, b"before")
    file.stop()
    writes(file, 6, b"after")
    writes(file, 11, b"x" * PAGE)
    file.seek(0)
    assert file.read(1) == b""
    file.discard()
