"""Decode stored codes to the values they are compared as."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.formats import Format, recode_table
from ckptdiff.spectra.kernels.panels import cast_to_bf16, widen_bf16

Floats = NDArray[Any]


def decode(stored: NDArray[np.uint8], format: Format, compare: Format, out: Floats) -> None:
    """Cast stored values to the compare format and write them as floats.

    They are read from raw little-endian bytes and written to a C-contiguous float32 or float64 array of as many values;
    float64 is rounded where that is float32.
    """
    codes = stored.view(format.code_dtype)
    flat = out.reshape(-1)
    if out.dtype == np.float64 and compare.bits <= 32:
        narrow = np.empty(flat.size, np.float32)
        decode(stored, format, compare, narrow)
        flat[:] = narrow
    elif format.name == compare.name == "bf16":
        widen_bf16(codes, flat.view(np.uint32))
    elif format.bits <= 16:
        np.take(_cast_values(format, compare), codes, out=flat, mode="clip")
    elif compare.name == "bf16":
        with np.errstate(over="ignore", invalid="ignore"):
            single = codes if format.bits == 32 else codes.view(np.float64).astype(np.float32).view(np.uint32)
        # A view that Numba types like what was read from a file: one compiled kernel serves both.
        single = single.view()
        single.flags.writeable = False
        cast_to_bf16(single, flat.view(np.uint32))
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(flat, codes.view(f"f{format.bits // 8}"), casting="same_kind")


@cache
def _cast_values(format: Format, compare: Format) -> Floats:
    """Value after the cast of every code of a format of at most 16 bits."""
    codes = recode_table(format, compare)
    values: Floats = compare.values()[codes] if compare.bits <= 16 else codes.view(f"f{compare.bits // 8}")
    return values
