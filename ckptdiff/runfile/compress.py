"""Compression of mask chunks: deflate, as HDF5's own filter reads it."""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ckptdiff.runfile.schema import MASK_CHUNK

__all__ = ["DEFLATED", "MASK_CHUNK", "RAW", "compress_chunk"]

DEFLATED = 0
"""Filter mask of a chunk that went through deflate."""
RAW = 1
"""Filter mask of a chunk that skipped deflate."""


def compress_chunk(packed: NDArray[np.uint8], chunk_bytes: int) -> tuple[bytes, int]:
    """Compress one chunk of a mask; safe in many threads at once, and zlib gives the GIL away.

    Parameters
    ----------
    packed : uint8 array, shape (n,)
        The chunk, bit-packed; n is at most `chunk_bytes` and less only at the end of a mask.
    chunk_bytes : int
        Bytes of a whole chunk (:func:`~ckptdiff.runfile.schema.mask_chunk_bytes`): the rest is padded with zeros.

    Returns
    -------
    payload : bytes
        What is stored.
    filter_mask : int
        :data:`DEFLATED` or :data:`RAW`.
    """
    if packed.size != chunk_bytes:
        packed = np.concatenate([packed, np.zeros(chunk_bytes - packed.size, np.uint8)])
    if not packed.any():
        return _zeros(chunk_bytes), DEFLATED
    deflater = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    payload = deflater.compress(np.ascontiguousarray(packed).data) + deflater.flush()
    return (payload, DEFLATED) if len(payload) < chunk_bytes else (packed.tobytes(), RAW)


@lru_cache(maxsize=64)
def _zeros(chunk_bytes: int) -> bytes:
    return zlib.compress(bytes(chunk_bytes), 9)
