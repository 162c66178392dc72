"""Hand codes with scales to a device that decodes them, and count what two sides have in common besides values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from ckptdiff.checkpoint.boxes import boxes_of_elements, matrix_of, read_elements
from ckptdiff.checkpoint.code_formats import CODES
from ckptdiff.checkpoint.decoding import BoxScales, Decoder, flip_of
from ckptdiff.checkpoint.kept import Kept, count_scales
from ckptdiff.checkpoint.kernels.code_values import decode_codes
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.checkpoint.weights import Assembled, Decoded, Weight
from ckptdiff.measure.code_box import Meaning
from ckptdiff.measure.cuda.coded_side import SideWriter, most_bytes
from ckptdiff.measure.cuda.layout import DEVICE_TILE
from ckptdiff.measure.cuda.slots import Room
from ckptdiff.measure.source import ByteArray

__all__ = ["CodedPair", "goes_as_codes", "room_to_send"]


def goes_as_codes(base: Weight, tuned: Weight) -> bool:
    """Whether a device that decodes can be handed a pair as it is stored.

    It cannot where a side is put together of pieces, or where the codes and scales of a tile take more than its values
    may: integers in rows of one column, for each of which a word is stored, and a scale.
    """
    if isinstance(base, Assembled) or isinstance(tuned, Assembled):
        return False
    coded = [side for side in (base, tuned) if isinstance(side, Decoded)]
    return bool(coded) and all(_most_bytes(side, DEVICE_TILE) <= Room.smallest().side_bytes for side in coded)


def room_to_send(base: Weight, tuned: Weight, numel: int) -> int:
    """Bytes that it takes to read so many elements of such a pair, beside those that are sent."""
    # Scales as they are stored, as floats, and those whose block begins there; and what tells where rows find them.
    return sum(4 * _most_bytes(side, numel) for side in (base, tuned) if isinstance(side, Decoded))


class CodedPair:
    """A span of a tensor pair of which a side is quantised; a :class:`~ckptdiff.measure.source.Coded`.

    Parameters
    ----------
    shards : OpenShards
    base, tuned : Weight
        For which :func:`goes_as_codes`.
    first : int
        Where the span begins.
    decoders : sequence of Decoder
        Of the thread, one for each side.
    counts : bool
        Whether to count what the sides have in common.

    Attributes
    ----------
    kept : Kept or None
        What they have, once the device has counted.
    """

    def __init__(
        self, shards: OpenShards, base: Weight, tuned: Weight, first: int, decoders: Sequence[Decoder], counts: bool
    ) -> None:
        self._shards, self._weights, self._first, self._decoders = shards, (base, tuned), first, decoders
        self.sides = isinstance(base, Decoded), isinstance(tuned, Decoded)
        self.counts = counts
        self.kept: Kept | None = None
        self._read = 0
        self._scales: list[tuple[int, int] | tuple[None, None]] = []

    def most_bytes(self, numel: int) -> int:
        """What a side of so many consecutive coordinates takes, at most."""
        return max(_most_bytes(side, numel) for side in self._weights if isinstance(side, Decoded))

    def read(self, first: int, stop: int, base: ByteArray, tuned: ByteArray) -> None:
        """Read coordinates of the span; CheckpointError if a file cannot be read, or changes."""
        begin, end = self._first + first, self._first + stop
        scales = [
            self._read_side(weight, decoder, begin, end, room)
            for weight, decoder, room in zip(self._weights, self._decoders, (base, tuned), strict=True)
        ]
        self._read += stop - first
        if self.counts and all(self.sides):
            self._scales += [count_scales(*both) for both in zip(*scales, strict=True)]

    def _read_side(self, weight: Weight, decoder: Decoder, first: int, stop: int, room: ByteArray) -> list[BoxScales]:
        if not isinstance(weight, Decoded):
            read_elements(self._shards, weight, first, stop, room)
            return []
        writer, found = SideWriter(room, _meaning(weight.code, flip_of(weight), weight.divides)), []
        for rows, columns in boxes_of_elements(weight.shape, first, stop):
            with decoder.opened(self._shards, weight, rows, columns, writer.rest) as (box, scales):
                writer.add(box)
            found.append(scales)
        return found

    def found(self, equal_codes: int, changed: int, within: int) -> None:
        """Take what the device counted of the whole span."""
        base, tuned = self._weights
        codes = isinstance(base, Decoded) and isinstance(tuned, Decoded) and base.code == tuned.code
        counted = self._scales if self._scales and (None, None) not in self._scales else []
        scales, equal = (sum(column) for column in zip(*counted, strict=True)) if counted else (None, None)
        self.kept = Kept(self._read, equal_codes if codes else None, scales, equal, changed, within)


@cache
def _meaning(name: str, flip: int, divides: bool) -> Meaning:
    """What the processor's decoder makes of every code, so that a device has the same."""
    code = CODES[name]
    count = 1 << code.bits
    fields = np.arange(count, dtype=np.uint8) ^ np.uint8(flip)
    bits = np.unpackbits(fields[:, None], axis=1, count=code.bits, bitorder="little")
    raw = np.packbits(bits, bitorder="little")
    raw.flags.writeable = False
    values, steps = np.empty((2, 1, count), np.float32)
    matrix = np.ones((1, 1), np.float32)
    grid = matrix, 0 * matrix, np.zeros(1, np.int64), count, 0
    decode_codes(raw, raw.size, 0, code, flip, grid, np.empty(0, np.float32), False, values, fields[None], steps)
    return Meaning(code.bits, flip, code.magnitude, divides, values[0], steps[0])


def _most_bytes(weight: Decoded, numel: int) -> int:
    (height, width), (rows, columns), bits = weight.block, matrix_of(weight.shape), CODES[weight.code].bits
    rows = min(rows, numel // columns + 2)
    # Rows may end in padding, and parts of one begin and end within a byte.
    codes = numel * bits // 8 + rows * (weight.codes.nbytes // weight.rows - columns * bits // 8 + 2)
    height = min(height, weight.period)
    lines = min(rows, rows // height + rows // weight.period + 4)
    scales = lines * min(-(-columns // width), numel // width + 2)
    return most_bytes(rows, codes, scales * (1 if CODES[weight.code].floats else 2), weight.global_scale is not None)
