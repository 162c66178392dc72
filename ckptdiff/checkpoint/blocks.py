"""Read one side, block by block, for what needs a single side."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import DTYPES
from ckptdiff.checkpoint.boxes import read_elements
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.checkpoint.weights import Weight
from ckptdiff.formats import stored_format
from ckptdiff.measure.partial import BLOCK

__all__ = ["blocks_of", "values_of"]


def blocks_of(shards: OpenShards, weight: Weight, block: int = BLOCK) -> Iterator[NDArray[np.uint8]]:
    """Codes as bytes, `block` coordinates at a time; each piece is read-only and valid until the next is asked for."""
    bits = DTYPES[weight.dtype].bits
    buffer = np.empty(min(block, weight.numel) * bits // 8, np.uint8)
    for first in range(0, weight.numel, block):
        stop = min(first + block, weight.numel)
        piece = buffer[: (stop - first) * bits // 8]
        read_elements(shards, weight, first, stop, piece)
        piece.flags.writeable = False
        yield piece


def values_of(dtype: str, stored: NDArray[np.uint8]) -> NDArray[np.floating]:
    """Float32 values of stored bytes, float64 of F64.

    Parameters
    ----------
    dtype : str
        Of a floating tensor, such as "BF16".
    stored : uint8 array
    """
    format = stored_format(dtype)
    if format.bits > 16:
        values: NDArray[np.floating] = stored.view(np.float64 if format.bits == 64 else np.float32)
        return values
    return format.values()[stored.view(format.code_dtype)]
