"""Compression of mask chunks: deflate, as HDF5's own filter reads it."""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ckptdiff.runfile.deflate import deflate
from ckptdiff.runfile.repeats import has_repeats
from ckptdiff.runfile.schema import MASK_CHUNK

__all__ = ["DEFLATED", "MASK_CHUNK", "RAW", "compress_chunk"]

DEFLATED = 0
"""Filter mask of a chunk that went through deflate."""
RAW = 1
"""Filter mask of a chunk that skipped deflate."""

_SMALL_CHUNK = 1024
_TINY_SHARE = 64
_SPARSE_SHARE = 5
_SAMPLE = 4096


def compress_chunk(packed: NDArray[np.uint8], chunk_bytes: int) -> tuple[bytes, int]:
    """Compress one chunk of a mask; safe in many threads at once, without the GIL for most of its time.

    Parameters
    ----------
    packed : contiguous uint8 array, shape (n,)
        The chunk, bit-packed; n is at most `chunk_bytes` and less only at the end of a mask.
    chunk_bytes : int
        Bytes of a whole chunk (:func:`~ckptdiff.runfile.schema.mask_chunk_bytes`): the rest is padded with zeros.

    Returns
    -------
    payload : bytes
        What is stored; apart from masks of very odd structure no larger than zlib's level 6 makes it.
    filter_mask : int
        :data:`DEFLATED` or :data:`RAW`.
    """
    if packed.size != chunk_bytes:
        packed = np.concatenate([packed, np.zeros(chunk_bytes - packed.size, np.uint8)])
    # Kernels are compiled for each kind of array that they are given; this keeps it to one kind.
    packed = packed.view()
    packed.setflags(write=False)
    if not packed.any():
        return _zeros(chunk_bytes), DEFLATED
    payload = _deflated(packed) if chunk_bytes >= _SMALL_CHUNK else zlib.compress(packed.data, 6)
    if payload is None or len(payload) >= chunk_bytes:
        return packed.tobytes(), RAW
    return payload, DEFLATED


def _deflated(packed: NDArray[np.uint8]) -> bytes | None:
    payload, costs = deflate(packed, packed.size)
    if has_repeats(packed, costs) or (payload is not None and _search_pays(packed, len(payload))):
        searched = zlib.compress(packed.data, 6)
        return searched if payload is None or len(searched) < len(payload) else payload
    return payload


def _search_pays(packed: NDArray[np.uint8], size: int) -> bool:
    """Whether zlib, which looks for strings that come again, is likely to beat `size` bytes."""
    if size < packed.size // _TINY_SHARE:
        return True
    # Sparse masks of some structure hold many short strings again. On sparse masks without any, zlib is 13 % worse.
    if packed.size < 8 * _SAMPLE or size > packed.size // _SPARSE_SHARE:
        return False
    sample = packed[packed.size // 2 :][:_SAMPLE]
    mine, _ = deflate(sample, _SAMPLE)
    return mine is not None and len(zlib.compress(sample.data, 6)) < 1.06 * len(mine)


@lru_cache(maxsize=64)
def _zeros(chunk_bytes: int) -> bytes:
    return zlib.compress(bytes(chunk_bytes), 9)
