"""Apply the zstd frames of many small tensors together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import TensorInfo
from ckptdiff.patch.coded_block import MOST_NUMBERS
from ckptdiff.patch.delta import TensorDelta
from ckptdiff.patch.digests import required
from ckptdiff.patch.small_tensors import bytes_of

__all__ = ["LEAST_WINDOW", "SmallFrames", "xor_small"]

Bytes: TypeAlias = NDArray[np.uint8]
Placed: TypeAlias = Sequence[tuple[TensorDelta, int]]
"""Tensors, and the byte at which each begins."""
SmallFrames: TypeAlias = Callable[[Placed, Bytes], Placed]
"""Makes the new bytes of tensors of the old ones, in place; returns those that have to be made by themselves."""
LEAST_WINDOW = 1 << 23
"""Bytes that a frame may ask zstd to keep, whatever the size of its tensor."""
_local = threading.local()


def xor_small(frames: Mapping[str, TensorInfo], descriptors: Mapping[str, int]) -> SmallFrames:
    """What applies frames of an exclusive or, given where they lie and the descriptor of each file."""
    return partial(_xor, frames, descriptors)


def _xor(
    frames: Mapping[str, TensorInfo],
    descriptors: Mapping[str, int],
    tensors: Placed,
    codes: Bytes,
) -> Placed:
    found = [frames[tensor.name] for tensor, _ in tensors]
    parts = [(frame.start, frame.stop - frame.start) for frame in found]
    paths = {frame.shard.path for frame in found}
    # Of what is larger, one at a time is held.
    if len(paths) != 1 or sum(size for _, size in parts) > 2 * codes.size + MOST_NUMBERS * len(tensors):
        return tensors
    (path,) = paths
    raw = memoryview(bytes_of(descriptors[path], parts, path))
    zstandard, decompressor = _zstandard()
    alone, at = [], 0
    for (tensor, start), (_, size) in zip(tensors, parts, strict=True):
        frame, at = raw[at : at + size], at + size
        try:
            # No more is ever made of it than it says.
            fits = zstandard.frame_content_size(frame) == tensor.nbytes
            apart = decompressor.decompress(frame) if fits else b""
        except zstandard.ZstdError:
            apart = b""
        if len(apart) == tensor.nbytes:
            part = codes[start : start + tensor.nbytes]
            np.bitwise_xor(part, np.frombuffer(apart, np.uint8), out=part)
        else:
            alone.append((tensor, start))
    return alone


def _zstandard() -> Any:
    """The module, and a decompressor of this thread."""
    found = getattr(_local, "found", None)
    if found is None:
        module = required("zstandard")
        found = _local.found = module, module.ZstdDecompressor(max_window_size=LEAST_WINDOW)
    return found
