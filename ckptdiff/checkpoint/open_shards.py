"""Hold the shards of a run open: each opened once, on first use, and checked again after the last read."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ckptdiff.checkpoint import Shard
from ckptdiff.checkpoint.open_shard import ShardReader

__all__ = ["OpenShards", "open_shards"]

_OTHER_FILES = 128
"""Room left below the limit on open files for all that are not shards."""


def _allow_open_files(count: int) -> None:
    """Raise the soft limit on open files if it is lower, as far as the hard one lets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class OpenShards:
    """Readers of all shards of both sides, opened on first use.

    Attributes
    ----------
    mapped : bool
        Whether they map their files.
    """

    def __init__(self, io: str) -> None:
        self._io = io
        self.mapped = io == "mmap"
        self._lock = threading.Lock()
        self._readers: dict[str, ShardReader] = {}  # by path: the hash of a shard costs more than a read

    def __getitem__(self, shard: Shard) -> ShardReader:
        reader = self._readers.get(shard.path)
        if reader is None:
            with self._lock:
                # A mapped file takes two descriptors, and a checkpoint may have hundreds of shards.
                _allow_open_files(2 * len(self._readers) + _OTHER_FILES)
                reader = self._readers.get(shard.path) or self._readers.setdefault(
                    shard.path, ShardReader(shard, self._io)
                )
        return reader

    def close(self) -> None:
        """Close all files."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def check(self) -> None:
        """Compare every file that was read with its header once more, and its path with the file."""
        for reader in list(self._readers.values()):  # other threads may open more
            reader.check()
            reader.check_path()


@contextmanager
def open_shards(io: str) -> Iterator[OpenShards]:
    """Readers that are checked after the last read, and closed."""
    shards = OpenShards(io)
    try:
        yield shards
        shards.check()
    finally:
        shards.close()
