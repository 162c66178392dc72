"""Define a part of a matrix of codes with scales, as it is handed to what makes values of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptdiff.measure.source import ByteArray

__all__ = ["CodeBox", "Meaning"]


@dataclass(frozen=True, slots=True)
class CodeBox:
    """Rows and columns of a matrix of codes.

    Attributes
    ----------
    raw : uint8 array, shape (n,)
        The codes of its rows.
    stride, skip : int
        Bytes from one row to the next, and bits at the beginning of each that are not of the box: less than 8.
    scales, zeros : float32 array, shape (k, l)
        The latter (0, 0) for floating codes.
    lines : int64 array, shape (rows,)
        The row of them that each row of the box takes.
    width, before : int
        Columns to a scale, and those of the first one that lie before the box.
    factors : float32 array, shape (rows,) or (0,)
        The global scale of each row.
    columns : int
        Of the box.
    """

    raw: ByteArray
    stride: int
    skip: int
    scales: NDArray[np.float32]
    zeros: NDArray[np.float32]
    lines: NDArray[np.int64]
    width: int
    before: int
    factors: NDArray[np.float32]
    columns: int


@dataclass(frozen=True, slots=True)
class Meaning:
    """What codes are worth before they are scaled: ``(value - zero) * scale``, times or over a global scale.

    Attributes
    ----------
    bits, flip, magnitude : int
        Of a code: how many there are, those of them to turn over first, and those that are zero in a zero.
    divides : bool
        Whether values are over the global scale.
    values, steps : float32 array, shape (2**bits,)
        Of each code, once bits are turned over: its value, and how far the next one is.
    """

    bits: int
    flip: int
    magnitude: int
    divides: bool
    values: NDArray[np.float32]
    steps: NDArray[np.float32]
