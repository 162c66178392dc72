"""Digest the bytes of a tensor (xxh3-128) that several threads read, block by block."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ckptdiff.checkpoint import Checkpoint
from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.errors import OptionError
from ckptdiff.events import Stage
from ckptdiff.in_order import Task, in_order

__all__ = ["TensorDigest", "digest_of", "digests_of", "require_xxhash"]

_AT_ONCE = 4 << 20
"""Bytes that are read at a time."""
_PATIENCE = 0.2
"""Seconds between two looks whether the run was given up."""


def require_xxhash() -> Any:
    """The module xxhash, or an OptionError that says how to get it."""
    try:
        import xxhash
    except ImportError:
        raise OptionError(
            "exact patches need xxhash, which is not installed", hint="pip install 'ckptdiff[patch]'"
        ) from None
    return xxhash


def digest_of(data: Any) -> str:
    """Digest of bytes that are at hand."""
    digest: str = require_xxhash().xxh3_128_hexdigest(data)
    return digest


class TensorDigest:
    """Digest of one tensor; each block waits until those before it have been added.

    Parameters
    ----------
    stop : threading.Event
        Set when the run is given up; who waits then raises InterruptedError.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._digest = require_xxhash().xxh3_128()
        self._next, self._stop = 0, stop
        self._turn = threading.Condition()

    def add(self, place: int, data: Any) -> None:
        """Add a block, of which every one before this is being added by another thread, or has been."""
        with self._turn:
            while self._next != place:
                if self._stop.is_set():
                    raise InterruptedError("the run was given up")
                self._turn.wait(_PATIENCE)
        self._digest.update(data)
        with self._turn:
            self._next += 1
            self._turn.notify_all()

    def value(self) -> str:
        """The digest of all that was added, in hexadecimal digits."""
        found: str = self._digest.hexdigest()
        return found


def digests_of(checkpoint: Checkpoint, names: Sequence[str], threads: int, told: Stage) -> Iterator[tuple[str, str]]:
    """Read tensors of a checkpoint, several at a time; yields the digest of each, in their order."""
    stop, xxhash = threading.Event(), require_xxhash()
    with open_shards("pread") as shards:

        def digest(name: str) -> tuple[str, str, int]:
            tensor = checkpoint.tensors[name]
            found = xxhash.xxh3_128()
            buffer = np.empty(min(_AT_ONCE, tensor.nbytes), np.uint8)
            for start in range(tensor.start, tensor.stop, _AT_ONCE):
                if stop.is_set():
                    raise InterruptedError("the run was given up")
                with shards[tensor.shard].window(tensor, start, min(start + _AT_ONCE, tensor.stop), buffer) as data:
                    found.update(data)
            return name, found.hexdigest(), tensor.nbytes

        tasks = (Task(lambda name=name: digest(name), 1, 1) for name in names)  # type: ignore[misc]
        for name, found, size in in_order(tasks, threads, stop.set, told.again):
            told.more(size, name)
            yield name, found
