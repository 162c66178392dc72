"""Windows on shards: the bytes of the file, in little memory, or an error if the file does not stay as it was."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import resource
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import PATIENCE

from ckptdiff.checkpoint import Shard, TensorInfo
from ckptdiff.checkpoint import open_shard as reader_module
from ckptdiff.checkpoint.header import read_header
from ckptdiff.checkpoint.open_shard import ShardReader
from ckptdiff.checkpoint.open_shards import OpenShards, open_shards
from ckptdiff.errors import ChangedFileError, CheckpointError

MODES = ("mmap", "pread")
PAGE = mmap.PAGESIZE
DATA = np.random.default_rng(5).integers(0, 256, 5 * PAGE + 1234, np.uint8).tobytes()
Change = Callable[[Path], None]


def write_shard(path: Path, data: bytes = DATA) -> tuple[Shard, TensorInfo]:
    header = b'{"w":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (len(data), len(data))
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    shard, tensors = read_header(str(path))
    return shard, tensors[0]


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shard, TensorInfo]:
    path = tmp_path_factory.mktemp("steady") / "model.safetensors"
    return path, *write_shard(path)


@pytest.fixture
def shaky(tmp_path: Path) -> tuple[Path, Shard, TensorInfo]:
    """A shard that a test may change; old enough that a change gives it another time."""
    path = tmp_path / "model.safetensors"
    write_shard(path)
    os.utime(path, ns=(10**18, 10**18))
    shard, (tensor,) = read_header(str(path))
    return path, shard, tensor


def buffer() -> Any:
    return np.empty(len(DATA) + 4096, np.uint8)


ranges = st.tuples(st.integers(0, len(DATA) + 60), st.integers(0, len(DATA) + 60)).map(sorted)


@pytest.mark.parametrize("io", MODES)
@settings(max_examples=60, deadline=None)
@given(windows=st.lists(ranges, min_size=1, max_size=6))
def test_a_window_holds_the_bytes_of_the_file(
    steady: tuple[Path, Shard, TensorInfo], io: str, windows: list[list[int]]
) -> None:
    path, shard, tensor = steady
    content = path.read_bytes()
    with open_shards(io) as shards:
        for start, stop in windows:
            stop = min(stop, len(content))
            start = min(start, stop)
            with shards[shard].window(tensor, start, stop, buffer()) as view:
                assert view.tobytes() == content[start:stop]
                assert view.dtype == np.uint8 and view.shape == (stop - start,)
                assert not view.flags.writeable
                assert view.ctypes.data % 8 == 0


@pytest.mark.parametrize("io", MODES)
@pytest.mark.parametrize("start", [0, 1, 7, 8, 9, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE - 8, 3 * PAGE + 4])
@pytest.mark.parametrize("size", [0, 1, 7, 8, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE])
def test_offsets_around_pages(steady: tuple[Path, Shard, TensorInfo], io: str, start: int, size: int) -> None:
    path, shard, tensor = steady
    with open_shards(io) as shards, shards[shard].window(tensor, start, start + size, buffer()) as view:
        assert view.tobytes() == path.read_bytes()[start : start + size]
        assert view.ctypes.data % 8 == 0


@pytest.mark.parametrize("io", MODES)
def test_a_window_cannot_be_written_to(steady: tuple[Path, Shard, TensorInfo], io: str) -> None:
    path, shard, tensor = steady
    before = path.read_bytes()
    with (
        open_shards(io) as shards,
        shards[shard].window(tensor, 64, 128, buffer()) as view,
        pytest.raises(ValueError, match="read-only"),
    ):
        view[0] = 1
    assert path.read_bytes() == before


def test_a_window_at_an_aligned_offset_is_mapped_and_not_copied(steady: tuple[Path, Shard, TensorInfo]) -> None:
    _, shard, tensor = steady
    unused = np.zeros(len(DATA), np.uint8)
    with open_shards("mmap") as shards, shards[shard].window(tensor, 64, 64 + PAGE, unused) as view:
        assert not np.shares_memory(view, unused)
    assert not unused.any()


def test_the_same_bytes_can_be_read_again_after_their_pages_were_dropped(
    steady: tuple[Path, Shard, TensorInfo],
) -> None:
    path, shard, tensor = steady
    with open_shards("mmap") as shards:
        for _ in range(3):
            with shards[shard].window(tensor, 8, 2 * PAGE, buffer()) as view:
                assert view.tobytes() == path.read_bytes()[8 : 2 * PAGE]


def shrink(path: Path) -> None:
    os.truncate(path, 2 * PAGE)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def rewrite(path: Path) -> None:
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.write(content)


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    status = path.stat()
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.replace(path)


def delete(path: Path) -> None:
    path.unlink()


CHANGES = [shrink, empty, grow, rewrite, replace, delete]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("io", MODES)
def test_a_change_before_the_first_window(shaky: tuple[Path, Shard, TensorInfo], io: str, change: Change) -> None:
    path, shard, _ = shaky
    change(path)
    with pytest.raises(ChangedFileError) as caught, open_shards(io) as shards:
        _ = shards[shard]
    assert caught.value.file == str(path) and caught.value.hint


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("io", MODES)
def test_a_change_between_windows(shaky: tuple[Path, Shard, TensorInfo], io: str, change: Change) -> None:
    path, shard, tensor = shaky
    with pytest.raises(ChangedFileError) as caught, open_shards(io) as shards:
        with shards[shard].window(tensor, 64, PAGE, buffer()):
            pass
        change(path)
        with shards[shard].window(tensor, PAGE, 4 * PAGE, buffer()):
            raise AssertionError("a window on a file that changed")
    assert caught.value.file == str(path)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("io", MODES)
def test_a_change_after_the_last_window(shaky: tuple[Path, Shard, TensorInfo], io: str, change: Change) -> None:
    path, shard, tensor = shaky
    with pytest.raises(ChangedFileError), open_shards(io) as shards:
        with shards[shard].window(tensor, 64, PAGE, buffer()):
            pass
        change(path)


def test_a_path_that_leads_elsewhere_in_the_end(shaky: tuple[Path, Shard, TensorInfo], tmp_path: Path) -> None:
    """As a cache snapshot whose links are moved on to newer files; the old file itself stays as it was."""
    path, _, _ = shaky
    other, link = tmp_path / "newer.safetensors", tmp_path / "link.safetensors"
    other.write_bytes(path.read_bytes())
    link.symlink_to(path)
    shard, (tensor,) = read_header(str(link))
    with pytest.raises(ChangedFileError), open_shards("mmap") as shards:
        with shards[shard].window(tensor, 64, PAGE, buffer()):
            link.unlink()
            link.symlink_to(other)
        with shards[shard].window(tensor, 64, PAGE, buffer()):
            pass


def test_another_name_that_comes_and_goes_is_no_change(shaky: tuple[Path, Shard, TensorInfo], tmp_path: Path) -> None:
    path, shard, tensor = shaky
    with open_shards("pread") as shards:
        for change in (lambda: (tmp_path / "alias").hardlink_to(path), lambda: (tmp_path / "alias").unlink(), int):
            change()
            with shards[shard].window(tensor, 64, PAGE, buffer()) as view:
                assert view.tobytes() == path.read_bytes()[64:PAGE]


@pytest.mark.parametrize("io", MODES)
def test_a_file_that_shrinks_unnoticed_until_it_is_read(
    shaky: tuple[Path, Shard, TensorInfo], io: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check and the read: pread comes back short, and populating the map fails."""
    path, shard, tensor = shaky
    reader = ShardReader(shard, io)
    monkeypatch.setattr(ShardReader, "check", lambda self: None)
    shrink(path)
    with (
        pytest.raises(ChangedFileError, match="shrank") as caught,
        reader.window(tensor, 64, 4 * PAGE, buffer()),
    ):
        raise AssertionError("a window on what is gone")  # the bytes are not touched, which might kill the tests
    reader.close()
    assert caught.value.tensor == "w" and str(2 * PAGE) in str(caught.value.found)


def in_process(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    preamble = """
        import os, sys
        import numpy as np
        from ckptdiff.checkpoint.header import read_header
        from ckptdiff.errors import ChangedFileError
        from ckptdiff.checkpoint.open_shard import ShardReader
        from ckptdiff.checkpoint.open_shards import open_shards

        path = sys.argv[1]
        shard, (tensor,) = read_header(path)
    """
    script = textwrap.dedent(preamble) + textwrap.dedent(code)
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_a_page_that_is_lost_while_it_is_in_use(shaky: tuple[Path, Shard, TensorInfo]) -> None:
    """Under mmap that is SIGBUS, as ``--io`` says; after pread there is nothing to lose."""
    code = """
        with open_shards(sys.argv[2]) as shards:
            with shards[shard].window(tensor, 64, shard.size, np.empty(shard.size, np.uint8)) as view:
                before = int(view.sum(dtype=np.uint64))
                os.truncate(path, 100)
                assert int(view.sum(dtype=np.uint64)) == before
    """
    content = shaky[0].read_bytes()
    mapped = in_process(code, shaky[0], "mmap")
    assert mapped.returncode == -signal.SIGBUS or "ChangedFileError" in mapped.stderr
    shaky[0].write_bytes(content)
    copied = in_process(code, shaky[0], "pread")
    assert copied.returncode == 1 and "ChangedFileError: the shard changed" in copied.stderr


@pytest.mark.parametrize("code", [errno.EINTR, errno.EAGAIN, errno.EINVAL])
def test_a_map_that_is_not_populated_is_read_all_the_same(
    steady: tuple[Path, Shard, TensorInfo], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardReader, "_advise", staticmethod(lambda view, advice: -1))
    monkeypatch.setattr(reader_module.ctypes, "get_errno", lambda: code)
    path, shard, tensor = steady
    with open_shards("mmap") as shards, shards[shard].window(tensor, 64, 3 * PAGE, buffer()) as view:
        assert view.tobytes() == path.read_bytes()[64 : 3 * PAGE]


@pytest.mark.parametrize("io", MODES)
def test_a_disk_that_fails(steady: tuple[Path, Shard, TensorInfo], io: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path, shard, tensor = steady
    with open_shards(io) as shards:
        reader = shards[shard]
        monkeypatch.setattr(reader_module.os, "preadv", broken)
        monkeypatch.setattr(ShardReader, "_advise", staticmethod(lambda view, advice: -1))
        monkeypatch.setattr(reader_module.ctypes, "get_errno", lambda: errno.EIO)
        with (
            pytest.raises(CheckpointError, match="Input/output error") as caught,
            reader.window(tensor, 64, PAGE, buffer()),
        ):
            raise AssertionError("a window on a broken disk")
    assert (caught.value.file, caught.value.tensor) == (str(path), "w")


def test_reads_that_come_in_parts(steady: tuple[Path, Shard, TensorInfo], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(reader_module.os, "preadv", lambda fd, views, offset, *f: real(fd, [views[0][:777]], offset))
    path, shard, tensor = steady
    with open_shards("pread") as shards, shards[shard].window(tensor, 3, 3 * PAGE, buffer()) as view:
        assert view.tobytes() == path.read_bytes()[3 : 3 * PAGE]


def test_a_file_system_without_maps(steady: tuple[Path, Shard, TensorInfo], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(reader_module.mmap, "mmap", refuse)
    with pytest.raises(CheckpointError, match="cannot map") as caught:
        ShardReader(steady[1], "mmap")
    assert caught.value.hint == "--io pread"


@pytest.mark.slow
def test_files_are_closed(steady: tuple[Path, Shard, TensorInfo]) -> None:
    def open_files() -> int:
        gc.collect()  # what other tests left behind must not be closed in between
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files()
    for io in MODES:
        with open_shards(io) as shards, shards[steady[1]].window(steady[2], 64, 128, buffer()):
            assert open_files() > before
        assert open_files() == before


def test_a_shard_is_opened_once_by_all_threads(steady: tuple[Path, Shard, TensorInfo]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with open_shards("mmap") as shards, ThreadPoolExecutor(8) as pool:
        readers = set(pool.map(lambda _: shards[steady[1]], range(200)))
    assert len(readers) == 1


def test_more_shards_than_the_limit_on_open_files(tmp_path: Path) -> None:
    shards = [write_shard(tmp_path / f"{i}.safetensors", b"12345678")[0] for i in range(60)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        with open_shards("mmap") as opened:
            for shard in shards:
                _ = opened[shard]
            assert len({opened[shard] for shard in shards}) == 60
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_more_files_can_be_opened(tmp_path: Path, steady: tuple[Path, Shard, TensorInfo]) -> None:
    code = """
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
        held = [os.open(path, os.O_RDONLY) for _ in range(20 - len(os.listdir("/proc/self/fd")) + 1)]
        with open_shards("mmap") as shards:
            shards[shard]
    """
    done = in_process(code, steady[0])
    assert "CheckpointError: cannot open the shard: Too many open files" in done.stderr, done.stderr
    assert "more than 20 open files" in done.stderr


def test_open_shards_checks_only_what_it_opened(shaky: tuple[Path, Shard, TensorInfo]) -> None:
    shards = OpenShards("mmap")
    shaky[0].unlink()
    shards.check()
    shards.close()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("io", MODES)
def test_memory_stays_bounded(tmp_path: Path, io: str) -> None:
    """200 MB go by, and no more than some windows are ever resident."""
    size = 200 << 20
    path = tmp_path / "model.safetensors"
    header = b'{"w":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
    header += b" " * (40_000 - len(header))  # windows start between the 64 KiB that the system maps around a fault
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
    code = """
        def peak():
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) << 10

        window = 500_000
        buffer = np.empty(window, np.uint8)
        buffer[:] = 0
        before = peak()
        with open_shards(sys.argv[2]) as shards:
            for start in range(tensor.start, tensor.stop, window):
                with shards[shard].window(tensor, start, min(start + window, tensor.stop), buffer) as view:
                    assert not view.any()
        print(peak() - before)
    """
    done = in_process(code, path, io)
    path.unlink()
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 << 20
