"""Kernels on stored codes: rounding to bfloat16, and counts that are taken before the cast."""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.backends.kernel_cache import kernel
from ckptdiff.backends.kernels.tiles import TILE, Array, count_nonfinite

__all__ = ["count_equal", "count_inexact", "count_strange_codes", "round_to_bf16"]


@kernel
def round_to_bf16(codes: Array, out: Array) -> None:
    """Round float32 codes to bfloat16 codes, to nearest even; NaN becomes the quiet NaN of its sign.

    Parameters
    ----------
    codes : read-only uint32 array, shape (n,)
    out : uint16 array, shape (n,)
    """
    for i in range(codes.size):
        code = codes[i]
        rounded = np.uint32(code + np.uint32(0x7FFF) + ((code >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        quiet = ((code >> np.uint32(16)) & np.uint32(0x8000)) | np.uint32(0x7FC0)
        out[i] = quiet if (code & np.uint32(0x7FFF_FFFF)) > np.uint32(0x7F80_0000) else rounded


@kernel
def count_inexact(codes: Array) -> int:
    """How many float32 values bfloat16 does not hold, NaN left out; ``codes`` is a read-only uint32 array."""
    total = 0
    for start in range(0, codes.size, TILE):
        part = codes[start : start + TILE]
        count: Any = np.int32(0)
        for i in range(part.size):
            nan = (part[i] & np.uint32(0x7FFF_FFFF)) > np.uint32(0x7F80_0000)
            count = np.int32(count + (((part[i] & np.uint32(0xFFFF)) != 0) & (not nan)))
        total += count
    return total


@kernel
def count_equal(a: Array, b: Array, magnitude: Any) -> int:
    """How many codes of two read-only unsigned arrays are equal, +0 equal to -0; ``magnitude`` has their dtype."""
    total = 0
    for start in range(0, a.size, TILE):
        x, y = a[start : start + TILE], b[start : start + TILE]
        count: Any = np.int32(0)
        for i in range(x.size):
            count = np.int32(count + ((x[i] == y[i]) | (((x[i] | y[i]) & magnitude) == 0)))
        total += count
    return total


@kernel
def count_strange_codes(codes: Array, magnitude: Any, infinite: Any) -> int:
    """How many codes of a read-only unsigned array are NaN or Inf; the limits have its dtype."""
    total = 0
    for start in range(0, codes.size, TILE):
        total += count_nonfinite(codes[start : start + TILE], magnitude, infinite)
    return total
