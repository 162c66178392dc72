"""Open windows on shards: memory maps whose pages are dropped after use, or reads into one buffer per thread.

A shard must not change while it is read. Its inode, size and time are compared when it is opened, before each window
and after the last one, and at the end its path must still lead to it. A page that disappears in between is an error
with ``pread``; under ``mmap`` the window is populated first, which reports most of those, and what is left kills the
process (SIGBUS).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import Shard, TensorInfo
from ckptdiff.checkpoint.kernels.boxes import read_box
from ckptdiff.codes.fetch import MEMORY
from ckptdiff.errors import ChangedFileError, CheckpointError, first_few

__all__ = ["ShardReader", "failed_once"]

READ_AHEAD = 16 << 20
"""Bytes asked for ahead of each window of a file that is not in the page cache."""

_NOTHING = np.empty(0, np.uint8)
_PAGE = mmap.PAGESIZE
_AROUND = 2 << 20
"""A page fault maps up to this much of what is cached around it; unless dropped, an eighth of a file stays mapped."""
_MADV_DONTNEED = 4
_MADV_POPULATE_READ = 22  # since Linux 5.14; the mmap module has no name for it

_POPULATES_NOTHING = (errno.EINVAL, errno.ENOSYS, errno.EINTR, errno.EAGAIN)
"""An older kernel, or one that was disturbed: pages come as they are touched."""

# Python's mmap.madvise holds the GIL while the disk works; ctypes gives it away.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class ShardReader:
    """One open shard; safe to use from many threads.

    Parameters
    ----------
    shard : Shard
        As its header was read.
    io : {"mmap", "pread"}

    Attributes
    ----------
    descriptor : int
        Of the open file, for code that reads by itself.

    Raises
    ------
    CheckpointError
        If the file cannot be opened.
    ChangedFileError
        If it is not the file whose header was read.
    """

    def __init__(self, shard: Shard, io: str) -> None:
        self.shard = shard
        try:
            self.descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise _vanished(shard, error) from error
        except OSError as error:
            hint = _more_files() if error.errno == errno.EMFILE else None
            raise CheckpointError(f"cannot open the shard: {error.strerror}", file=shard.path, hint=hint) from error
        self._bytes: NDArray[np.uint8] | None = None
        self._advised = 0, 0  # a window and what was asked for after it
        self._links = 0
        try:
            self.check()
            if io == "mmap":
                self._bytes = self._mapped()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; a map lives until its last window is gone."""
        self._bytes = None
        os.close(self.descriptor)

    def check(self) -> None:
        """Compare inode, size and time with those of the header.

        Raises
        ------
        ChangedFileError
            If any differs, or the file has lost its name.
        """
        status = os.fstat(self.descriptor)
        self._compare(status)
        if status.st_nlink < self._links:  # cheaper than to look at the path each time
            self.check_path()
        self._links = status.st_nlink

    def check_path(self) -> None:
        """Make sure that the path still leads to the file whose header was read.

        Raises
        ------
        ChangedFileError
            If it leads to nothing or to another file.
        """
        try:
            status = Path(self.shard.path).stat()
        except OSError as error:
            raise _vanished(self.shard, error) from error
        self._compare(status)

    def _compare(self, found: os.stat_result) -> None:
        now = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        then = (self.shard.device, self.shard.inode, self.shard.size, self.shard.mtime_ns)
        if now != then:
            raise ChangedFileError(
                "the shard changed while it was read",
                file=self.shard.path,
                expected=f"{then[2]} bytes of inode {then[1]}, modified at {then[3]} ns",
                found=f"{now[2]} bytes of inode {now[1]}, modified at {now[3]} ns",
                hint="compare a copy that nothing writes to",
            )

    def _mapped(self) -> NDArray[np.uint8]:
        try:
            mapped = mmap.mmap(self.descriptor, self.shard.size, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
        except ValueError:  # shorter than a moment ago
            self.check()
            raise
        except OSError as error:
            raise CheckpointError(
                f"cannot map the shard: {error.strerror}", file=self.shard.path, hint="--io pread"
            ) from error
        return np.frombuffer(mapped, np.uint8)

    def lend(self, stack: ExitStack, tensor: TensorInfo, start: int, stop: int) -> tuple[int, int]:
        """Say where compiled code finds bytes `start` to `stop` as long as the stack is open.

        Returns
        -------
        tuple of int
            As runs have it: the descriptor and the byte, or ``MEMORY`` and an address.

        Raises
        ------
        ChangedFileError
            If the file changed.
        """
        if self._maps(start):
            view = stack.enter_context(self.window(tensor, start, stop, _NOTHING))
            return MEMORY, view.ctypes.data
        return self.ready(start, stop), start

    def read_rows(self, tensor: TensorInfo, start: int, stride: int, out: NDArray[np.uint8]) -> None:
        """Read parts of equal length into the rows of `out`: the first from `start` on, the next `stride` bytes behind.

        Raises
        ------
        CheckpointError
            If the file cannot be read, or changed.
        """
        count, size = out.shape
        came = read_box(self.ready(start, start + (count - 1) * stride + size), start, stride, out)
        if came < count:
            at = start + came * stride
            with self.window(tensor, at, at + size, np.empty(size, np.uint8)):
                pass
            raise failed_once([tensor])

    def _maps(self, start: int) -> bool:
        return self._bytes is not None and start % 8 == 0

    def ready(self, start: int, stop: int) -> int:
        """Check the file and tell the disk that bytes ``start`` to ``stop`` come next.

        Returns
        -------
        int
            The file's descriptor, for code that reads by itself.

        Raises
        ------
        ChangedFileError
            If the file changed.
        """
        self.check()
        self._read_ahead(start, stop)
        return self.descriptor

    @contextmanager
    def window(
        self, tensor: TensorInfo, start: int, stop: int, buffer: NDArray[np.uint8]
    ) -> Iterator[NDArray[np.uint8]]:
        """Bytes ``start`` to ``stop`` of the file, read-only, at an address that is a multiple of 8.

        Parameters
        ----------
        tensor : TensorInfo
            Whose bytes these are, for messages.
        buffer : uint8 array
            At least as long; used unless the window can be mapped.

        Raises
        ------
        ChangedFileError
            If the file changed.
        """
        self.ready(start, stop)
        if self._bytes is None or not self._maps(start):
            yield self._read(tensor, start, stop, buffer)
            return
        view = self._bytes[start:stop]
        self._populate(tensor, view)
        yield view
        self._drop(start, stop)

    def _read(self, tensor: TensorInfo, start: int, stop: int, buffer: NDArray[np.uint8]) -> NDArray[np.uint8]:
        target = buffer[: stop - start]
        done = 0
        while done < target.size:
            try:
                count = os.preadv(self.descriptor, [target[done:].data], start + done)
            except OSError as error:
                raise CheckpointError(
                    f"cannot read the shard: {error.strerror}", file=self.shard.path, tensor=tensor.name
                ) from error
            if not count:
                raise self._shrank(tensor, stop, start + done)
            done += count
        view = target.view()
        view.flags.writeable = False
        return view

    def _populate(self, tensor: TensorInfo, view: NDArray[np.uint8]) -> None:
        """Map all pages of a window at once: quicker than a fault each, and a lost page is an error, not a signal."""
        if view.size and self._advise(view, _MADV_POPULATE_READ):
            code = ctypes.get_errno()
            if code == errno.EFAULT:
                raise self._shrank(tensor, tensor.stop, os.fstat(self.descriptor).st_size)
            if code not in _POPULATES_NOTHING:
                raise CheckpointError(
                    f"cannot read the shard: {os.strerror(code)}", file=self.shard.path, tensor=tensor.name
                )

    def _drop(self, start: int, stop: int) -> None:
        """Give back the pages of a window, and those that the system mapped around it."""
        if self._bytes is not None:
            # Never beyond the map: what lies there may be anyone's memory, and would be lost.
            self._advise(self._bytes[max(start - _AROUND, 0) : stop + _AROUND], _MADV_DONTNEED)

    @staticmethod
    def _advise(view: NDArray[np.uint8], advice: int) -> int:
        first = view.ctypes.data // _PAGE * _PAGE
        result: int = _libc.madvise(first, view.ctypes.data + view.size - first, advice)
        return result

    def _read_ahead(self, start: int, stop: int) -> None:
        """Ask the disk for a window and for what follows it, unless that is in the page cache already."""
        if not hasattr(os, "posix_fadvise"):
            return
        first, last = self._advised
        begin, end = last if first <= start <= last else start, min(stop + READ_AHEAD, self.shard.size)
        if end - begin < READ_AHEAD // 2 and end < self.shard.size:
            return
        self._advised = start, max(end, begin)
        if begin < end and not self._cached(end - 1):
            os.posix_fadvise(self.descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)

    def _cached(self, offset: int) -> bool:
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        try:
            return os.preadv(self.descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except OSError:  # EAGAIN: not there; EOPNOTSUPP: the file system cannot tell
            return False

    def _shrank(self, tensor: TensorInfo, expected: int, found: int) -> ChangedFileError:
        return ChangedFileError(
            "the shard shrank while it was read",
            file=self.shard.path,
            tensor=tensor.name,
            expected=f"{expected} bytes",
            found=f"{found} bytes",
            hint="compare a copy that nothing writes to",
        )


def failed_once(sides: Sequence[TensorInfo]) -> CheckpointError:
    """The error where compiled code could not read a tensor, and a second look finds nothing wrong."""
    paths = list(dict.fromkeys(side.shard.path for side in sides))
    return CheckpointError(
        "a shard could not be read, and then it could",
        file=first_few(paths, most=len(paths), between=" or "),
        tensor=sides[0].name,
        hint="run it again; if that happens again, look at the disk or the network they are on",
    )


def _more_files() -> str:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return f"a hard limit of more than {hard} open files (ulimit -Hn), or checkpoints of fewer and larger shards"


def _vanished(shard: Shard, error: OSError) -> ChangedFileError:
    return ChangedFileError(
        "the shard vanished while it was read",
        file=shard.path,
        found=error.strerror,
        hint="compare a copy that nothing moves or deletes",
    )
