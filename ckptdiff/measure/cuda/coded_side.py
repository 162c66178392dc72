"""Lay out a side that goes up as codes with scales: the records of ``cuda/layout.cuh``, and arrays behind them."""

from __future__ import annotations

import numpy as np

from ckptdiff.measure.code_box import CodeBox, Meaning
from ckptdiff.measure.source import ByteArray

MOST_BOXES = 3
"""The rest of a row, whole rows, a part of one."""
ARRAYS = 5
"""Arrays of a box: codes, scales, zeros, lines, factors."""
ALIGNED = 16
"""Each begins at a multiple of this."""

CODE_BOX = np.dtype(
    [
        (name, "u4")
        for name in (
            *("first", "numel", "columns", "codes", "stride", "skip", "scales"),
            *("zeros", "across", "lines", "width", "before", "factors"),
        )
    ]
)
CODES = np.dtype(
    [
        *((name, "u4") for name in ("size", "bits", "flip", "magnitude", "divides", "boxes")),
        ("box", CODE_BOX, MOST_BOXES),
        ("values", "f4", 256),
        ("steps", "f4", 256),
    ]
)
"""What such a side begins with, and one of its boxes."""


class SideWriter:
    """Writes a side box after box.

    Parameters
    ----------
    room : uint8 array, shape (n,)
        Receives it. ValueError, if a box does not fit.
    meaning : Meaning
    """

    def __init__(self, room: ByteArray, meaning: Meaning) -> None:
        self._room, self._codes = room, room[: CODES.itemsize].view(CODES)
        self._codes[...] = np.zeros(1, CODES)
        self._at = _aligned(CODES.itemsize)
        self._numel = 0
        for name in ("bits", "flip", "magnitude", "divides"):
            self._codes[name] = getattr(meaning, name)
        self._codes["values"][0, : meaning.values.size] = meaning.values
        self._codes["steps"][0, : meaning.steps.size] = meaning.steps
        self._codes["size"] = self._at

    @property
    def rest(self) -> ByteArray:
        """What is left of the room: the codes of the next box may be in it already."""
        return self._room[self._at :]

    def add(self, box: CodeBox) -> None:
        """Write one more box, whose coordinates follow those of the last."""
        record = self._codes["box"][0, int(self._codes["boxes"][0])]
        record["first"], record["numel"], record["columns"] = self._numel, len(box.lines) * box.columns, box.columns
        record["codes"], record["stride"], record["skip"] = self._at, box.stride, box.skip
        record["across"] = box.scales.shape[1]
        # One scale for all columns may be one for more than fit into 32 bits.
        whole = box.scales.shape[1] == 1
        record["width"], record["before"] = (box.columns, 0) if whole else (box.width, box.before)
        if box.raw.ctypes.data == self.rest.ctypes.data:
            self._at += _aligned(box.raw.size)
        else:
            self._put(box.raw)
        for name, array in (("scales", box.scales), ("zeros", box.zeros), ("factors", box.factors)):
            if array.size:
                record[name] = self._put(array)
        record["lines"] = self._put(box.lines.astype(np.uint32))
        self._codes["boxes"] += 1
        self._codes["size"] = self._at
        self._numel += len(box.lines) * box.columns

    def _put(self, array: np.ndarray) -> int:
        """Where an array is now."""
        at = self._at
        self._room[at : at + array.nbytes].view(array.dtype)[:] = array.reshape(-1)
        self._at += _aligned(array.nbytes)
        return at


def size_of(side: ByteArray) -> int:
    """Bytes of a side that was written."""
    return int(side[: CODES.itemsize].view(CODES)["size"][0])


def most_bytes(rows: int, codes: int, scales: int, factors: bool) -> int:
    """Bytes of a side of so many rows, bytes of codes, scales and zeros, with or without factors, at most."""
    arrays = codes + 4 * (scales + rows * (1 + factors))
    return _aligned(CODES.itemsize) + arrays + MOST_BOXES * ARRAYS * ALIGNED


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
