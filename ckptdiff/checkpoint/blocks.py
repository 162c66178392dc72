"""Read one tensor, block by block, for what needs a single side."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import DTYPES, TensorInfo
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.formats import stored_format
from ckptdiff.measure.partial import BLOCK

__all__ = ["blocks_of", "values_of"]


def blocks_of(shards: OpenShards, tensor: TensorInfo, block: int = BLOCK) -> Iterator[NDArray[np.uint8]]:
    """Stored bytes, `block` coordinates at a time; each piece is read-only and valid until the next is asked for."""
    size = block * DTYPES[tensor.dtype].bits // 8
    buffer = np.empty(min(size, tensor.nbytes), np.uint8)
    for start in range(tensor.start, tensor.stop, size):
        with shards[tensor.shard].window(tensor, start, min(start + size, tensor.stop), buffer) as piece:
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
