"""Hold the shards of a run open: each opened once, on first use, and checked again after the last read."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from ckptdiff.checkpoint import Shard
from ckptdiff.checkpoint.open_shard import ShardReader

if TYPE_CHECKING:
    from ckptdiff.checkpoint.remote_shard import RemoteReader
    from ckptdiff.remote.fetching import Fetching

__all__ = ["OTHER_FILES", "OpenShards", "allow_open_files", "open_shards"]

REMOTE_ROOM = 64 << 20
"""Bytes of remote files that are held ahead where no plan says how many."""
_AT_ONCE = 16
OTHER_FILES = 128
"""Room left below the limit on open files for all that are not shards."""


def allow_open_files(count: int) -> None:
    """Raise the soft limit on open files if it is lower, as far as the hard one lets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class OpenShards:
    """Readers of all shards of both sides, opened on first use.

    Parameters
    ----------
    io : {"mmap", "pread"}
        How local files are read.
    room : int
        Bytes of remote files that may be held before they are asked for.
    found_here : callable, optional
        Gives a local shard as this machine has it, where another one read its header.

    Attributes
    ----------
    mapped : bool
        Whether they map their files.
    room : int
    """

    def __init__(
        self, io: str, room: int = REMOTE_ROOM, found_here: Callable[[Shard], Shard] = lambda shard: shard
    ) -> None:
        self._io, self._found_here = io, found_here
        self.room = room
        self._fetching: Fetching | None = None
        self.mapped = io == "mmap"
        self._lock = threading.Lock()
        self._readers: dict[str, ShardReader | RemoteReader] = {}  # by path: the hash of a shard costs more than a read

    def __getitem__(self, shard: Shard) -> ShardReader | RemoteReader:
        reader = self._readers.get(shard.path)
        if reader is None:
            with self._lock:
                # A mapped file takes two descriptors, and a checkpoint may have hundreds of shards.
                allow_open_files(2 * len(self._readers) + OTHER_FILES)
                reader = self._readers.get(shard.path) or self._readers.setdefault(shard.path, self._open(shard))
        return reader

    def _open(self, shard: Shard) -> ShardReader | RemoteReader:
        if shard.remote is None:
            return ShardReader(self._found_here(shard), self._io)
        from ckptdiff.checkpoint.remote_shard import RemoteReader

        return RemoteReader(shard, shard.remote, self._fetcher())

    def _fetcher(self) -> Fetching:
        if self._fetching is None:
            from ckptdiff.remote.fetching import Fetching

            self._fetching = Fetching(self.room)
        return self._fetching

    def ahead(self, parts: Sequence[tuple[Shard, int, int]]) -> AbstractContextManager[object]:
        """:meth:`all_ahead` of one task."""
        return self.all_ahead([parts])[0]

    def all_ahead(
        self, tasks: Sequence[Sequence[tuple[Shard, int, int]]], first: bool = False
    ) -> Sequence[AbstractContextManager[object]]:
        """Have bytes of remote files fetched that tasks will read, while tasks before them are worked on.

        Parameters
        ----------
        tasks : sequence of sequences of (Shard, int, int)
            Of each task, parts of remote files, from a byte to another.
        first : bool
            Whether they come before the tasks of earlier calls.

        Returns
        -------
        sequence of context managers
            To be entered when a task begins; what was fetched is dropped when it is left.
        """
        if not any(tasks):
            return [nullcontext()] * len(tasks)
        from ckptdiff.remote.fetching import ByteRange

        ranges = [
            [ByteRange(shard.remote, start, stop) for shard, start, stop in parts if shard.remote is not None]
            for parts in tasks
        ]
        with self._lock:
            return self._fetcher().leases(ranges, first)

    def close(self) -> None:
        """Close all files."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        if self._fetching is not None:
            self._fetching.close()

    def check(self) -> None:
        """Compare every file that was read with its header once more, and its path with the file."""
        readers = list(self._readers.values())  # other threads may open more
        for reader in readers:
            reader.check()
        with ThreadPoolExecutor(_AT_ONCE) if self._fetching else nullcontext() as pool:
            # A file elsewhere takes its way to a host and back.
            for _ in (pool.map if pool else map)(lambda reader: reader.check_path(), readers):
                pass


@contextmanager
def open_shards(
    io: str, room: int = REMOTE_ROOM, found_here: Callable[[Shard], Shard] = lambda shard: shard
) -> Iterator[OpenShards]:
    """Readers that are checked after the last read, and closed."""
    shards = OpenShards(io, room, found_here)
    try:
        yield shards
        shards.check()
    finally:
        shards.close()
