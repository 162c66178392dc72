"""Open windows on a shard that lies elsewhere: the bytes that were fetched, where they lie in memory.

Each answer of its host is checked, so a shard that is replaced while it is read is found at the next one; after the
last one, one byte is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import Shard, TensorInfo
from ckptdiff.codes.fetch import MEMORY
from ckptdiff.errors import CheckpointError
from ckptdiff.remote.fetching import GAP, ByteRange, Fetching
from ckptdiff.remote.remote_file import RemoteFile
from ckptdiff.remote.transport import fetch

__all__ = ["RemoteReader"]

_BATCH = 32 << 20
"""Bytes of a file that rows of a box are gathered from at a time, about."""


class RemoteReader:
    """One shard elsewhere; read like a :class:`~ckptdiff.checkpoint.open_shard.ShardReader`, from many threads.

    Parameters
    ----------
    shard : Shard
        As its header was read.
    file : RemoteFile
        The same.
    fetching : Fetching
        Of the run.

    Attributes
    ----------
    descriptor : int
        ``MEMORY``: there is no file, and where its bytes lie :meth:`lend` says.
    """

    descriptor = MEMORY

    def __init__(self, shard: Shard, file: RemoteFile, fetching: Fetching) -> None:
        self.shard, self._file, self._fetching = shard, file, fetching
        self._read = False

    def close(self) -> None:
        """Nothing is open."""

    def check(self) -> None:
        """Each answer has been checked."""

    def check_path(self) -> None:
        """Make sure that the file is still what it was, if anything was read since this was last asked.

        Raises
        ------
        ChangedFileError
            If it has been replaced.
        CheckpointError
            If it cannot be had any more.
        """
        if self._read:
            self._read = False
            fetch(self._file.address, 0, memoryview(bytearray(1)), self._file.version)

    def ready(self, start: int, stop: int) -> int:
        """Nothing to tell a disk; returns ``MEMORY``."""
        return MEMORY

    @contextmanager
    def window(
        self, tensor: TensorInfo, start: int, stop: int, buffer: NDArray[np.uint8]
    ) -> Iterator[NDArray[np.uint8]]:
        """Bytes ``start`` to ``stop`` of the file, read-only, where they were fetched to.

        Raises
        ------
        ChangedFileError
            If the file has been replaced.
        CheckpointError
            If it cannot be fetched.
        """
        self._read = True
        try:
            with self._fetching.view(self._file, start, stop, tensor.stop) as view:
                yield view
        except CheckpointError as error:
            error.tensor = error.tensor or tensor.name
            raise

    def lend(self, stack: ExitStack, tensor: TensorInfo, start: int, stop: int) -> tuple[int, int]:
        """Say where compiled code finds bytes `start` to `stop` as long as the stack is open; errors as of a window."""
        return MEMORY, stack.enter_context(self.window(tensor, start, stop, _NOTHING)).ctypes.data

    def read_rows(self, tensor: TensorInfo, start: int, stride: int, out: NDArray[np.uint8]) -> None:
        """Read parts of equal length into the rows of `out`, close ones by one request; errors as of a window.

        Parameters
        ----------
        tensor : TensorInfo
        start, stride : int
            Where the first part begins, and how far behind it the next one.
        out : uint8 array, shape (parts, bytes)
        """
        count, size = out.shape
        rows = max(1, _BATCH // min(stride, size + GAP))
        for first in range(0, count, rows):
            places = [start + row * stride for row in range(first, min(first + rows, count))]
            with self._fetching.lease([ByteRange(self._file, at, at + size) for at in places]):
                for row, at in enumerate(places, first):
                    with self.window(tensor, at, at + size, _NOTHING) as view:
                        out[row] = view


_NOTHING = np.empty(0, np.uint8)
