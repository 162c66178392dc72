"""Code the change of a block as few bytes, and read it back: where codes changed, and by how many steps.

A block is 2^20 codes, the last one of a tensor fewer. Its bytes are numbers as LEB128 (seven bits a byte, lowest first,
the high bit says that more follow), then streams:

| mode | numbers | then |
|---|---|---|
| 0 | count, shift, coding, and of each of four streams size, stored size | streams of ``kernels/steps.py: lay_out`` |
| 1 | stored size | the tuned bytes themselves |

A stream whose stored size is less than its size is a zlib stream, else it is there as it is. Nothing is stored of a
block without changes.
"""

from __future__ import annotations

import threading
import zlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import DTYPES, Kind
from ckptdiff.deflate.deflate import deflate_parts
from ckptdiff.patch.kernels.small_blocks import SEARCH, STEPS, STREAMS, WHOLE
from ckptdiff.patch.kernels.steps import add_steps, find_steps, lay_out, read_positions, read_steps

__all__ = [
    "MOST_NUMBERS",
    "BlockRooms",
    "Coding",
    "DamagedBlockError",
    "Steps",
    "apply_block",
    "code_block",
    "code_steps",
    "code_whole",
    "frozen",
    "inflated",
    "read_block",
]

Bytes = NDArray[np.uint8]
MOST_NUMBERS = 64
"""Bytes of a coded block beside what it holds."""
_LEVEL = 6
_rooms = threading.local()


class DamagedBlockError(Exception):
    """Bytes that are no block of this tensor."""


@dataclass(frozen=True, slots=True)
class Coding:
    """How the bytes of a tensor are taken as codes."""

    width: int
    """Bytes of a code."""
    floating: bool
    """Whether it is a sign and a magnitude."""

    @classmethod
    @cache
    def of(cls, dtype: str) -> Coding:
        """Codes of a dtype; elements of less than a byte are taken as bytes, complex numbers as their two parts."""
        known = DTYPES[dtype]
        if dtype == "C64":
            return cls(4, True)
        return cls(max(known.bits // 8, 1) if known.bits % 8 == 0 else 1, known.kind is Kind.FLOAT and known.bits >= 8)


@dataclass(frozen=True, slots=True)
class Steps:
    """The change of a block."""

    positions: NDArray[np.uint32]
    """Of the codes that changed, ascending."""
    z: NDArray[np.uint64]
    """By how much each, as :mod:`~ckptdiff.patch.kernels.steps` says."""


class BlockRooms:
    """Arrays that one thread works in, on blocks of so many codes."""

    def __init__(self, numel: int, width: int) -> None:
        self.numel, self.width = numel, width
        self.positions, self.steps = np.empty(numel + 1, np.uint32), np.empty(numel + 1, np.uint64)
        self.out = np.empty(numel // 128 + (3 + width) * numel + 64, np.uint8)


def _room(numel: int, coding: Coding) -> BlockRooms:
    found: BlockRooms | None = getattr(_rooms, "found", None)
    if found is None or found.numel < numel or found.width < coding.width:
        found = _rooms.found = BlockRooms(numel, coding.width)
    return found


def code_block(base: Bytes, tuned: Bytes, coding: Coding) -> tuple[bytes, int]:
    """Code what changed in a block; nothing if nothing did.

    Parameters
    ----------
    base, tuned : uint8 array, shape (n * width,)
    coding : Coding

    Returns
    -------
    bytes
    int
        How many codes changed.
    """
    base, tuned = frozen(base), frozen(tuned)
    rooms = _room(base.size // coding.width, coding)
    count = find_steps(base, tuned, coding.width, coding.floating, rooms.positions, rooms.steps)
    if not count:
        return b"", 0
    coded = _coded(rooms.positions, rooms.steps, count, base.size // coding.width, rooms.out)
    return coded if len(coded) < tuned.size else code_whole(tuned), count


def code_steps(steps: Steps, numel: int, coding: Coding) -> bytes:
    """Code steps that are known, of a block of `numel` codes."""
    if not steps.positions.size:
        return b""
    return _coded(steps.positions, steps.z, steps.positions.size, numel, _room(numel, coding).out)


def code_whole(tuned: Bytes) -> bytes:
    """Code a block by what it holds afterwards."""
    (stream,) = _squeezed(tuned, np.array([0, tuned.size]))
    return _numbers(WHOLE, len(stream)) + stream


def _coded(positions: Any, z: Any, count: int, numel: int, out: Bytes) -> bytes:
    bounds = np.empty(STREAMS + 1, np.int64)
    shift, coding = lay_out(positions, z, count, numel, out, bounds)
    streams = _squeezed(out, bounds)
    sizes = np.diff(bounds).tolist()
    facts = [number for size, stream in zip(sizes, streams, strict=True) for number in (size, len(stream))]
    return b"".join([_numbers(STEPS, count, shift, coding, *facts), *streams])


def _squeezed(data: Bytes, bounds: NDArray[np.int64]) -> list[bytes]:
    """Each part of the data as a zlib stream where that is smaller, else as it is."""
    view = frozen(data)
    rows = np.column_stack([bounds[:-1], bounds[1:], np.diff(bounds)])
    held = rows[rows[:, 2] > 0]
    found = iter(deflate_parts(view, held)) if held.size else iter(())
    streams = []
    for start, stop, size in rows.tolist():
        best = b""
        if size:
            mine = next(found)
            best = mine.stream or view[start:stop].tobytes()
            if mine.repeats and size >= SEARCH:
                best = min(best, zlib.compress(view[start:stop].data, _LEVEL), key=len)
        streams.append(best)
    return streams


def frozen(data: Bytes) -> Bytes:
    """Read-only bytes: kernels are compiled for each kind of array that they are given; this keeps it to one kind."""
    view = data.view()
    view.flags.writeable = False
    return view


def _numbers(*numbers: int) -> bytes:
    found = bytearray()
    for number in numbers:
        while number >= 0x80:
            found.append(number & 0x7F | 0x80)
            number >>= 7
        found.append(number)
    return bytes(found)


class _Reader:
    """The parts of a coded block, one after the other."""

    def __init__(self, coded: bytes) -> None:
        self._coded, self._at = coded, 0

    def number(self) -> int:
        value = shift = 0
        while True:
            if self._at >= len(self._coded) or shift > 35:
                raise DamagedBlockError("its numbers do not end")
            byte = self._coded[self._at]
            self._at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def stream(self, size: int, stored: int) -> Bytes:
        """The next stream; `size` has been found possible, so that no more than that is ever made."""
        data = self._coded[self._at : self._at + stored]
        self._at += stored
        if len(data) != stored or stored > size:
            raise DamagedBlockError("a stream is cut short")
        if stored < size:
            data = inflated(data, size)
        return np.frombuffer(data, np.uint8)

    def end(self) -> None:
        if self._at != len(self._coded):
            raise DamagedBlockError("bytes follow its last stream")


def inflated(data: bytes, size: int) -> bytes:
    """What a zlib stream holds, if that is of this size; never is more made of it."""
    inflate = zlib.decompressobj()
    try:
        found = inflate.decompress(data, size)
        if len(found) < size or (not inflate.eof and inflate.decompress(inflate.unconsumed_tail, 1)):
            raise DamagedBlockError("a stream has another size than it says")
    except zlib.error as error:
        raise DamagedBlockError(f"a stream is damaged: {error}") from error
    if not inflate.eof or inflate.unused_data:
        raise DamagedBlockError("a stream has another size than it says")
    return found


def read_block(coded: bytes, numel: int, coding: Coding) -> Steps | Bytes | None:
    """Read what :func:`code_block` wrote of a block of `numel` codes.

    Returns
    -------
    Steps, uint8 array or None
        Steps, valid until the next block is read in this thread; or all bytes of the block; or None without a change.

    Raises
    ------
    DamagedBlockError
        Never is more made of it than such a block can hold.
    """
    if not coded:
        return None
    reader = _Reader(coded)
    mode = reader.number()
    if mode == WHOLE:
        whole = reader.stream(numel * coding.width, reader.number())
        reader.end()
        return whole
    if mode != STEPS:
        raise DamagedBlockError(f"its mode is {mode}")
    count, shift, kind = reader.number(), reader.number(), reader.number()
    if not 0 < count <= numel or (shift > 24 and shift != 255) or kind > 1:
        raise DamagedBlockError(f"{count} changes of {numel}, shift {shift}, coding {kind}")
    sizes = [(reader.number(), reader.number()) for _ in range(STREAMS)]
    limits = (count + numel // 128 + 64, 3 * count + 1, count, 9 * count + 1)
    if any(size > limit for (size, _), limit in zip(sizes, limits, strict=True)) and shift != 255:
        raise DamagedBlockError("a stream is larger than any of such a block")
    if shift == 255 and (sizes[0][0] != (numel + 7) // 8 or any(one[0] > 9 * count + 1 for one in sizes[1:])):
        raise DamagedBlockError("a stream is larger than any of such a block")
    gaps, low, symbols, extra = (reader.stream(*size) for size in sizes)
    reader.end()
    rooms = _room(numel, coding)
    if read_positions(gaps, low, shift, count, numel, rooms.positions):
        raise DamagedBlockError("its positions do not ascend within the block")
    if read_steps(symbols, extra, kind, count, coding.width, rooms.steps):
        raise DamagedBlockError("it has not as many steps as changes")
    return Steps(rooms.positions[:count], rooms.steps[:count])


def apply_block(codes: Bytes, change: Steps | Bytes | None, coding: Coding) -> None:
    """Make the tuned bytes of a block of the base's, in place."""
    if isinstance(change, Steps):
        add_steps(codes, coding.width, coding.floating, change.positions, change.z, change.positions.size)
    elif change is not None:
        codes[:] = change
