"""Compress mask chunks with deflate, as HDF5's own filter reads it."""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ckptdiff.deflate.deflate import Deflated, deflate_parts

DEFLATED = 0
"""Filter mask of a chunk that went through deflate."""
RAW = 1
"""Filter mask of a chunk that skipped deflate."""

ENCODED = 4096
"""Bytes of the smallest chunk that goes to our own encoder."""
_EMPTY, _ONE_RUN = 24, 1000
"""What a run of one byte takes: the ends of the stream and the code, and two bits for each 258 bytes."""


_NO_STREAM = Deflated(None, repeats=False)


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
    return compress_parts(packed, np.array([0]), np.array([chunk_bytes]))[0]


def compress_parts(
    packed: NDArray[np.uint8], starts: NDArray[np.int64], sizes: NDArray[np.int64]
) -> list[tuple[bytes, int]]:
    """Compress many whole chunks that lie in one array; the same as :func:`compress_chunk` on each.

    Parameters
    ----------
    packed : contiguous uint8 array
    starts, sizes : int64 array, shape (k,)
        Where each chunk lies, and its bytes.
    """
    if packed.flags.writeable:
        # Kernels are compiled for each kind of array that they are given; this keeps it to one kind.
        packed = packed.view()
        packed.flags.writeable = False
    large = np.flatnonzero(sizes >= ENCODED)
    deflated: dict[int, Deflated] = {}
    if large.size:
        parts = np.column_stack([starts, starts + sizes, sizes])[large]
        deflated = dict(zip(large.tolist(), deflate_parts(packed, parts), strict=True))
    found = []
    for i, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
        stream, repeats = deflated.get(i, _NO_STREAM)
        if stream is None or repeats or _is_one_run(stream, size):
            chunk = packed[start : start + size]
            payload = _best(chunk, deflated[i]) if i in deflated else _searched(chunk)
            found.append((chunk.tobytes(), RAW) if payload is None or len(payload) >= size else (payload, DEFLATED))
        else:  # as nearly all are, of which there may be tens of thousands
            found.append((stream, DEFLATED))
    return found


def _best(packed: NDArray[np.uint8], mine: Deflated) -> bytes | None:
    if mine.stream is not None and _is_one_run(mine.stream, packed.size):
        return mine.stream if packed.any() else _zeros(packed.size)
    if mine.repeats:
        searched = zlib.compress(packed.data, 6)
        return searched if mine.stream is None or len(searched) < len(mine.stream) else mine.stream
    return mine.stream


def _is_one_run(stream: bytes, size: int) -> bool:
    """Whether a stream is as short as that of a run of one byte."""
    return len(stream) < _EMPTY + size // _ONE_RUN


def _searched(packed: NDArray[np.uint8]) -> bytes:
    return zlib.compress(packed.data, 6) if packed.any() else _zeros(packed.size)


@lru_cache(maxsize=64)
def _zeros(chunk_bytes: int) -> bytes:
    return zlib.compress(bytes(chunk_bytes), 9)
