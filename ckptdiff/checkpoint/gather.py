"""Read tensors that do not lie in one run out of their slices, wherever each element of these lies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint.dtypes import DTYPES
from ckptdiff.checkpoint.header import Slice, TensorInfo
from ckptdiff.checkpoint.kernels.boxes import read_box
from ckptdiff.checkpoint.open_shard import failed_once
from ckptdiff.checkpoint.open_shards import OpenShards

__all__ = ["read_bytes_of", "read_slices"]

_FAR = 4
"""Stride from which on each element of a line is a read of its own; below, what lies between is read too."""

Box = tuple[tuple[int, int], ...]
"""Start and stop along each axis."""


def read_slices(
    shards: OpenShards, tensor: TensorInfo, lines: tuple[int, int], across: tuple[int, int]
) -> NDArray[Any]:
    """Read a box of a tensor's matrix out of its slices.

    Parameters
    ----------
    shards : OpenShards
    tensor : TensorInfo
    lines, across : (first, stop)
        Rows and columns of its matrix: all axes but the last together, and the last.

    Returns
    -------
    array of codes, shape (rows, columns)

    Raises
    ------
    CheckpointError
        If a file cannot be read, or changes.
    """
    columns = across[1] - across[0]
    out = np.empty((lines[1] - lines[0], columns), f"u{DTYPES[tensor.dtype].bits // 8}")
    done = 0
    for ahead in _boxes(tensor.shape[:-1], *lines):
        found = _read(shards, tensor, (*ahead, across)).reshape(-1, columns)
        out[done : done + len(found)] = found
        done += len(found)
    return out


def read_bytes_of(
    shards: OpenShards,
    tensor: TensorInfo,
    stride: int,
    top: int,
    bottom: int,
    left: int,
    right: int,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Read a box of a tensor that is looked at as a matrix of bytes, row by row.

    Parameters
    ----------
    stride : int
        Bytes of a row: whole elements.
    top, bottom, left, right : int
        Rows and columns.
    out : uint8 array, optional
        Receives them.
    """
    size = DTYPES[tensor.dtype].bits // 8
    boxes = _boxes(tensor.shape, top * stride // size, bottom * stride // size)
    raw = np.concatenate([_read(shards, tensor, box).reshape(-1).view(np.uint8) for box in boxes])
    rows = raw.reshape(-1, stride)[:, left:right]
    out = np.empty(rows.size, np.uint8) if out is None else out[: rows.size]
    out.reshape(rows.shape)[:] = rows
    view = out.view()
    view.flags.writeable = False
    return view


def _read(shards: OpenShards, tensor: TensorInfo, box: Box) -> NDArray[Any]:
    """A box of a tensor, out of its slices."""
    out = np.empty([stop - start for start, stop in box], f"u{DTYPES[tensor.dtype].bits // 8}")
    for one in tensor.slices:
        common = tuple(
            (max(start, at), min(stop, at + size))
            for (start, stop), at, size in zip(box, one.offsets, one.sizes, strict=True)
        )
        if all(start < stop for start, stop in common):
            within = zip(common, box, strict=True)
            place = tuple(slice(start - first, stop - first) for (start, stop), (first, _) in within)
            out[place] = _gather(shards, tensor, one, common)
    return out


def _boxes(shape: tuple[int, ...], first: int, stop: int) -> Iterator[Box]:
    """The boxes that entries `first` to `stop` - 1 fill, in order."""
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    (top, above), (bottom, below) = divmod(first, inner), divmod(stop, inner)
    if top == bottom:
        yield from (((top, top + 1), *box) for box in _boxes(shape[1:], above, below))
        return
    if above:
        yield from (((top, top + 1), *box) for box in _boxes(shape[1:], above, inner))
        top += 1
    if top < bottom:
        yield ((top, bottom), *((0, size) for size in shape[1:]))
    if below:
        yield from (((bottom, bottom + 1), *box) for box in _boxes(shape[1:], 0, below))


def _gather(shards: OpenShards, tensor: TensorInfo, one: Slice, box: Box) -> NDArray[Any]:
    """Read a box of a tensor that lies in one of its slices."""
    size = DTYPES[tensor.dtype].bits // 8
    begin = sum((start - at) * step for (start, _), at, step in zip(box, one.offsets, one.strides, strict=True))
    sizes = [stop - start for start, stop in box]
    # Along a stride of 0, as of an expanded tensor, all elements are one.
    counts = [count if step else 1 for count, step in zip(sizes, one.strides, strict=True)]
    # As they lie in the file: the axis of the longest stride outside, and those that touch as one.
    order = sorted(range(len(box)), key=lambda axis: -one.strides[axis] if counts[axis] > 1 else -math.inf)
    axes: list[tuple[int, int]] = []
    for axis in order:
        count, stride = counts[axis], one.strides[axis]
        if axes and axes[-1][1] == count * stride:
            count *= axes.pop()[0]
        axes.append((count, stride))
    if axes[-1][1] >= _FAR:
        axes.append((1, 1))
    *outer, (length, step) = axes
    rows, stride = outer.pop() if outer else (1, 0)
    width = ((length - 1) * step + 1) * size
    found = np.empty((math.prod(count for count, _ in outer), rows, length), f"u{size}")
    line = np.empty((rows, width), np.uint8)
    reader = shards[one.shard]
    for number, place in enumerate(itertools.product(*(range(count) for count, _ in outer))):
        at = begin + sum(index * far for index, (_, far) in zip(place, outer, strict=True))
        start = one.start + at * size
        came = read_box(reader.ready(start, start + (rows - 1) * stride * size + width), start, stride * size, line)
        if came < rows:
            start += came * stride * size
            with reader.window(tensor, start, start + width, np.empty(width, np.uint8)):
                pass
            raise failed_once([tensor])
        found[number] = line.view(f"u{size}")[:, ::step]
    stored = found.reshape([counts[axis] for axis in order])
    return np.broadcast_to(stored.transpose(np.argsort(order)), sizes)
