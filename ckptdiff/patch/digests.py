"""Digest the bytes of a tensor that several threads read, block by block.

A digest is text: hexadecimal digits of xxh3-128, or, of another checksum, its name, a colon, and its digits.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import numpy as np

from ckptdiff import errors
from ckptdiff.checkpoint import Checkpoint
from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.events import Stage
from ckptdiff.in_order import Task, in_order
from ckptdiff.patch.in_turn import InTurn

__all__ = [
    "CHECKSUMS",
    "BlockDigests",
    "TensorDigest",
    "checksum_of",
    "digest_of",
    "digests_of",
    "digests_of_parts",
    "required",
]

CHECKSUMS = ("xxh3-128", "blake3", "adler32")
"""What a directory of deltas may give of each tensor; all but the last take a module of their name."""

_AT_ONCE = 4 << 20
"""Bytes that are read at a time."""


def required(name: str) -> Any:
    """A module of the extra `patch`, or an OptionError that says how to get it."""
    return errors.required(name, "this kind of patch needs", "patch")


class _Adler32:
    """Adler-32 from its start value 1, as eight digits."""

    def __init__(self) -> None:
        self._value = 1

    def update(self, data: Any) -> None:
        self._value = zlib.adler32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def _hasher(checksum: str) -> Any:
    if checksum == "adler32":
        return _Adler32()
    return required("blake3").blake3() if checksum == "blake3" else required("xxhash").xxh3_128()


def checksum_of(digest: str) -> str:
    """Which of :data:`CHECKSUMS` a digest is."""
    name, colon, _ = digest.partition(":")
    return name if colon else CHECKSUMS[0]


@cache
def _at_hand() -> Callable[[Any], str]:
    """The digest of bytes at hand by the first of :data:`CHECKSUMS`, in one call."""
    found: Callable[[Any], str] = required("xxhash").xxh3_128_hexdigest
    return found


def digest_of(data: Any, checksum: str = CHECKSUMS[0]) -> str:
    """Digest of bytes that are at hand."""
    if checksum == CHECKSUMS[0]:
        return _at_hand()(data)
    hasher = _hasher(checksum)
    hasher.update(data)
    return _text(hasher, checksum)


def digests_of_parts(data: Any, parts: Iterable[tuple[int, int]], checksum: str = CHECKSUMS[0]) -> list[str]:
    """Digests of parts of bytes that are at hand, each from a byte to another."""
    view = memoryview(data)
    digest = _at_hand() if checksum == CHECKSUMS[0] else partial(digest_of, checksum=checksum)
    return [digest(view[start:stop]) for start, stop in parts]


def _text(hasher: Any, checksum: str) -> str:
    digits: str = hasher.hexdigest()
    return digits if checksum == CHECKSUMS[0] else f"{checksum}:{digits}"


class TensorDigest:
    """Digest of one tensor; each block waits until those before it have been added.

    Parameters
    ----------
    stop : threading.Event
        Set when the run is given up; who waits then raises InterruptedError.
    checksum : str
        One of :data:`CHECKSUMS`.
    """

    def __init__(self, stop: threading.Event, checksum: str = CHECKSUMS[0]) -> None:
        self._digest, self._checksum = _hasher(checksum), checksum
        self._turns = InTurn(stop)

    def add(self, place: int, data: Any) -> None:
        """Add a block, of which every one before this is being added by another thread, or has been."""
        with self._turns.at(place):
            self._digest.update(data)

    def value(self) -> str:
        """The digest of all that was added."""
        return _text(self._digest, self._checksum)


class BlockDigests:
    """Digests of tensors of which several threads have the blocks of one or both sides.

    Parameters
    ----------
    stop, checksum
        As :class:`TensorDigest` takes them.
    """

    def __init__(self, stop: threading.Event, checksum: str = CHECKSUMS[0]) -> None:
        self._stop, self._checksum = stop, checksum
        self._begun: dict[str, list[TensorDigest]] = {}

    def add(self, name: str, place: int, blocks: int, *sides: Any) -> list[str | None]:
        """Add a block of a tensor that has so many; None stands for a side that lacks it.

        Returns
        -------
        list of (str or None)
            With the last block, the digest of each side that there is; else nothing.
        """
        if blocks == 1:
            return [None if side is None else digest_of(side, self._checksum) for side in sides]
        digests = self._begun.setdefault(name, [TensorDigest(self._stop, self._checksum) for _ in sides])
        for digest, side in zip(digests, sides, strict=True):
            if side is not None:
                digest.add(place, side)
        if place < blocks - 1:
            return []
        del self._begun[name]
        return [None if side is None else digest.value() for digest, side in zip(digests, sides, strict=True)]


def digests_of(
    checkpoint: Checkpoint, checksums: Mapping[str, str], threads: int, told: Stage
) -> Iterator[tuple[str, str]]:
    """Read tensors of a checkpoint, several at a time; yields the digest of each, in their order.

    `checksums` says of each name which of :data:`CHECKSUMS` is asked for.
    """
    stop = threading.Event()
    with open_shards("pread") as shards:

        def digest(name: str, checksum: str) -> tuple[str, str, int]:
            tensor, found = checkpoint.tensors[name], _hasher(checksum)
            buffer = np.empty(min(_AT_ONCE, tensor.nbytes), np.uint8)
            for start in range(tensor.start, tensor.stop, _AT_ONCE):
                if stop.is_set():
                    raise InterruptedError("the run was given up")
                with shards[tensor.shard].window(tensor, start, min(start + _AT_ONCE, tensor.stop), buffer) as data:
                    found.update(data)
            return name, _text(found, checksum), tensor.nbytes

        tasks = (Task(lambda one=one: digest(*one), 1, 1) for one in checksums.items())  # type: ignore[misc]
        for name, found, size in in_order(tasks, threads, stop.set, told.again):
            told.more(size, name)
            yield name, found
