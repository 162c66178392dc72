"""Code and apply what changed in many small tensors together: byte for byte as one by one, in a call for all."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint.regular_file import read_bytes
from ckptdiff.patch.coded_block import MOST_NUMBERS, BlockRooms, Coding, code_block, frozen
from ckptdiff.patch.delta import TensorDelta
from ckptdiff.patch.kernels import small_blocks
from ckptdiff.patch.kernels.small_blocks import ALONE, FACTS

__all__ = ["apply_small", "apply_stored", "bytes_of", "code_small", "rows_of"]

Bytes: TypeAlias = NDArray[np.uint8]
Blocks: TypeAlias = NDArray[np.int64]
_SMALL = 1 << 16
"""Codes of a tensor up to which it is coded together with others."""
_rooms = threading.local()


def rows_of(tensors: Iterable[tuple[int, int, Coding]]) -> Blocks:
    """What kernels are told of tensors: where each begins, how many codes of how many bytes it has, and their kind."""
    rows = [(start, codes, coding.width, coding.floating) for start, codes, coding in tensors]
    return np.array(rows, np.int64).reshape(len(rows), 4)


class _SmallRooms:
    """Arrays in which one thread works on many small tensors."""

    def __init__(self) -> None:
        of_one = BlockRooms(_SMALL, 8)
        self.steps, self.laid = (of_one.positions, of_one.steps), of_one.out
        # Of a coded block, and of one that is read: one that lies may say that it has 14 bytes of a code.
        self.streams = np.empty(max(of_one.out.size, 14 * _SMALL + _SMALL // 128) + 128, np.uint8)
        self.spans = np.empty((of_one.out.size // 8 + 1, 2), np.int64)


def _small_rooms() -> _SmallRooms:
    found: _SmallRooms | None = getattr(_rooms, "small", None)
    if found is None:
        found = _rooms.small = _SmallRooms()
    return found


def code_small(base: Bytes, tuned: Bytes, blocks: Blocks) -> list[tuple[bytes, int]]:
    """Do what :func:`code_block` does with several tensors of a block each, most of them in one compiled call.

    Parameters
    ----------
    base, tuned : uint8 array
        The tensors, each at the same place on both sides.
    blocks : int64 array, shape (k, 4)
        Of each tensor the byte at which it begins, how many codes it has, of how many bytes, and whether they are
        floating.
    """
    base, tuned = frozen(base), frozen(tuned)
    rooms, found = _small_rooms(), np.zeros((len(blocks), 2), np.int64)
    together = _together(blocks)
    few, some = np.ascontiguousarray(blocks[together]), np.empty((int(together.sum()), 2), np.int64)
    out = np.empty(int((few[:, 1] * few[:, 2]).sum()) + 32 * len(few), np.uint8)
    small_blocks.code_small((base, tuned), few, rooms.steps, rooms.laid, rooms.streams, rooms.spans, out, some)
    found[:, 0] = ALONE
    found[together] = some
    coded, at, data = [], 0, out[: int(np.maximum(some[:, 0], 0).sum())].tobytes()
    for (start, numel, width, floating), (size, changed) in zip(blocks.tolist(), found.tolist(), strict=True):
        if size == ALONE:
            before, after = (side[start : start + numel * width].copy() for side in (base, tuned))
            coded.append(code_block(before, after, Coding(width, bool(floating))))
        else:
            coded.append((data[at : at + size], changed))
            at += size
    return coded


def apply_small(codes: Bytes, blocks: Blocks, coded: bytes, sizes: Sequence[int]) -> list[int]:
    """Do what :func:`read_block` and :func:`apply_block` do with several tensors of a block each.

    Parameters
    ----------
    codes : uint8 array
        Their bytes, which are changed.
    blocks
        As :func:`code_small` takes them.
    coded : bytes
        What was coded of each, one behind the other.
    sizes : sequence of int
        Bytes of each.

    Returns
    -------
    list of int
        Those that are left as they were, and have to be read by themselves: large, stored whole, or damaged.
    """
    bounds = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=bounds[1:])
    data, facts = np.frombuffer(coded, np.uint8), np.zeros((len(blocks), FACTS), np.int64)
    small_blocks.read_facts(data, blocks, bounds, facts)
    facts[~_together(blocks), 0] = 0
    alone = np.flatnonzero((facts[:, 0] == 0) & (np.diff(bounds) > 0)).tolist()
    rooms = _small_rooms()
    done = small_blocks.apply_small(codes, blocks, facts, data, rooms.streams, rooms.steps)
    return sorted({*alone, *range(done, len(blocks))})


def apply_stored(codes: Bytes, tensors: Sequence[tuple[TensorDelta, int]], descriptor: int, path: str) -> Sequence[int]:
    """Do what :func:`apply_small` does, with tensors of an open delta, each given with the byte at which it begins."""
    sizes = [one.sizes[0] for one, _ in tensors]
    # Of what is larger, one at a time is held.
    if len(tensors) < 2 or sum(sizes) > 2 * codes.size + MOST_NUMBERS * len(tensors):
        return range(len(tensors))
    rows = rows_of((start, one.codes, one.coding) for one, start in tensors)
    coded = bytes_of(descriptor, [(one.offset, size) for (one, _), size in zip(tensors, sizes, strict=True)], path)
    return apply_small(codes, rows, coded, sizes)


def bytes_of(descriptor: int, parts: Sequence[tuple[int, int]], path: str) -> bytes:
    """Bytes of a file, from each offset on so many; what lies one behind the other is read at once."""
    found: list[bytes] = []
    start = stop = parts[0][0]
    for offset, size in parts:
        if offset != stop:
            found.append(read_bytes(descriptor, stop - start, start, path))
            start = offset
        stop = offset + size
    return b"".join([*found, read_bytes(descriptor, stop - start, start, path)])


def _together(blocks: Blocks) -> NDArray[np.bool_]:
    """Which tensors one compiled call takes: small ones, whose codes lie where a processor reads them at once."""
    together: NDArray[np.bool_] = (blocks[:, 1] <= _SMALL) & (blocks[:, 0] % blocks[:, 2] == 0)
    return together
