"""Read a side of a pair in the order of the base's elements, from wherever they lie.

Every tensor is looked at as a matrix: its last axis are the columns, all others together the rows; a tensor of one
axis is one row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint.decoding import Decoder
from ckptdiff.checkpoint.dtypes import DTYPES
from ckptdiff.checkpoint.gather import read_slices
from ckptdiff.checkpoint.header import TensorInfo
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.checkpoint.region import read_numel, rows_of
from ckptdiff.checkpoint.scattered import pieces_of
from ckptdiff.checkpoint.weights import Assembled, CommonPart, Decoded, Piece, Range, Source, Weight

__all__ = [
    "Run",
    "boxes_of_elements",
    "is_contiguous",
    "matrix_of",
    "read_elements",
    "read_weight",
    "room_to_read",
    "runs_of",
    "stored_parts",
]

Codes = NDArray[Any]

_SHORTEST = 1 << 12
"""Elements of a run that compiled code reads by itself; shorter ones are gathered first."""


class Run(NamedTuple):
    """Elements that lie one after the other, on both sides."""

    first: int
    """Of the base's tensor."""
    tensor: TensorInfo
    start: int
    """Of the tensor that holds them."""
    numel: int


class _Corner(NamedTuple):
    """Entry i, j of a box is in row ``row + i * down`` and column ``column + j * right`` of a matrix."""

    row: int
    down: int
    column: int
    right: int


class _Box(NamedTuple):
    """A part of a piece that is a box of one matrix on either side."""

    rows: int
    columns: int
    """Of the base's box; the other has the same, or these swapped."""
    base: _Corner
    tuned: _Corner
    source: Source
    transposed: bool


def stored_parts(weight: Weight) -> tuple[TensorInfo, ...]:
    """The stored tensors that a side is read from."""
    if isinstance(weight, TensorInfo):
        return (weight,)
    if isinstance(weight, Decoded):
        return weight.parts
    if isinstance(weight, CommonPart):
        return stored_parts(weight.whole)
    return tuple(dict.fromkeys(part for piece in weight.pieces for part in stored_parts(piece.source)))


def is_contiguous(weight: Weight) -> bool:
    """Whether compiled code can read a side by itself: it lies in runs that are long enough."""
    if isinstance(weight, TensorInfo) and not weight.slices:
        return True
    return not isinstance(weight, Decoded | CommonPart) and _all_runs(weight) is not None


def room_to_read(weight: Weight, numel: int) -> int:
    """Bytes that it takes to read so many elements of a side that is not contiguous, beside those themselves."""
    if is_contiguous(weight):
        return 0
    if isinstance(weight, CommonPart):
        # Its rows, in full; twice, and which of them are asked for.
        rows = -(-read_numel(weight.region) * numel // weight.numel)
        return room_to_read(weight.whole, rows) + rows * (2 * DTYPES[weight.dtype].bits // 8 + 1)
    # Interleaved halves are read whole; of whole rows a little more than asked for.
    return 4 * numel * DTYPES[weight.dtype].bits // 8 + (1 << 20)


def runs_of(weight: Weight, first: int, stop: int) -> list[Run]:
    """The runs that hold elements ``first`` to ``stop`` - 1 of a contiguous side, cut to them."""
    if isinstance(weight, TensorInfo) and not weight.slices:
        return [Run(first, weight, first, stop - first)]
    runs = None if isinstance(weight, Decoded | CommonPart) else _all_runs(weight)
    assert runs is not None
    found = []
    for run in runs:
        skipped, end = max(first - run.first, 0), min(stop - run.first, run.numel)
        if skipped < end:
            found.append(Run(run.first + skipped, run.tensor, run.start + skipped, end - skipped))
    return found


def read_elements(
    shards: OpenShards, weight: Weight, first: int, stop: int, out: NDArray[np.uint8], decoder: Decoder | None = None
) -> None:
    """Read elements ``first`` to ``stop`` - 1 of a side.

    Parameters
    ----------
    shards : OpenShards
    weight : Weight
    first, stop : int
        In the order of the base's tensor.
    out : uint8 array, shape ((stop - first) * itemsize,)
        Receives them as codes of the side's dtype. Its address is a multiple of the itemsize.
    decoder : Decoder, optional
        Of this thread and side.

    Raises
    ------
    CheckpointError
        If a file cannot be read, or changes.
    """
    if isinstance(weight, TensorInfo) and not weight.slices:
        bits = DTYPES[weight.dtype].bits
        start = weight.start + first * bits // 8
        with shards[weight.shard].window(weight, start, start + out.size, out) as view:
            if not np.shares_memory(view, out):
                out[:] = view
        return
    codes = out.view(f"u{DTYPES[weight.dtype].bits // 8}")
    if isinstance(weight, CommonPart):
        columns = matrix_of(weight.whole.shape)[1]
        for lines, chosen in rows_of(weight.region, first, stop):
            rows = np.empty((lines[1] - lines[0], columns), codes.dtype)
            read_weight(shards, weight.whole, lines, (0, columns), rows, decoder)
            found = rows[chosen]
            codes[: found.size] = found
            codes = codes[found.size :]
        return
    if isinstance(weight, Assembled):
        # Whole rows: a part of one may be as many reads as it has elements.
        columns = matrix_of(weight.shape)[1]
        top, bottom = first // columns, -(-stop // columns)
        whole = first == top * columns and stop == bottom * columns
        rows = codes.reshape(-1, columns) if whole else np.empty((bottom - top, columns), codes.dtype)
        read_weight(shards, weight, (top, bottom), (0, columns), rows, decoder)
        if not whole:
            codes[:] = rows.reshape(-1)[first - top * columns : stop - top * columns]
        return
    for lines, across in boxes_of_elements(weight.shape, first, stop):
        box = codes[: (lines[1] - lines[0]) * (across[1] - across[0])].reshape(lines[1] - lines[0], -1)
        read_weight(shards, weight, lines, across, box, decoder)
        codes = codes[box.size :]


def boxes_of_elements(
    shape: tuple[int, ...], first: int, stop: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Rows and columns of the boxes that elements ``first`` to ``stop`` - 1 fill: the rest of a row, rows, a part."""
    width = matrix_of(shape)[1]
    while first < stop:
        row, column = divmod(first, width)
        if column or stop - first < width:
            end = min(width, column + stop - first)
            yield (row, row + 1), (column, end)
            first += end - column
        else:
            yield (row, stop // width), (0, width)
            first = stop // width * width


def read_weight(
    shards: OpenShards,
    weight: Weight,
    rows: tuple[int, int],
    columns: tuple[int, int],
    out: Codes,
    decoder: Decoder | None = None,
) -> None:
    """Read a box of a side.

    Parameters
    ----------
    shards : OpenShards
    weight : Weight
    rows, columns : (first, stop)
        Of its matrix.
    out : array of codes, shape (rows, columns)
        Receives them.
    decoder : Decoder, optional
        Of this thread and side.

    Raises
    ------
    CheckpointError
        If a file cannot be read, or changes.
    """
    decoder = decoder or Decoder()
    if isinstance(weight, Decoded):
        decoder.decode(shards, weight, rows, columns, out.view(np.float32))
        return
    if isinstance(weight, TensorInfo):
        out[:] = _read_source(shards, weight, rows, columns, decoder)
        return
    assert isinstance(weight, Assembled)  # the elements of a part lie in no box
    for box in _boxes(weight):
        row, down, column, right = box.base
        lines, across = _inside(row, down, box.rows, rows), _inside(column, right, box.columns, columns)
        if lines is None or across is None:
            continue
        target = out[_steps(row - rows[0], down, lines), _steps(column - columns[0], right, across)]
        row, down, column, right = box.tuned
        if box.transposed:
            lines, across = across, lines
        vertical, horizontal = _steps(row, down, lines), _steps(column, right, across)
        within = (vertical.start, vertical.stop), (horizontal.start, horizontal.stop)
        found = _read_source(shards, box.source, *within, decoder)[::down, ::right]
        target[:] = found.T if box.transposed else found


def _inside(start: int, step: int, count: int, bounds: tuple[int, int]) -> tuple[int, int] | None:
    """Which of so many steps from a start lie within bounds."""
    first, stop = max(0, -(-(bounds[0] - start) // step)), min(count, -(-(bounds[1] - start) // step))
    return (first, stop) if first < stop else None


def _steps(start: int, step: int, steps: tuple[int, int]) -> slice:
    """Some steps from a start, and no further."""
    return slice(start + steps[0] * step, start + (steps[1] - 1) * step + 1, step)


def _read_source(
    shards: OpenShards, source: Source, lines: tuple[int, int], across: tuple[int, int], decoder: Decoder
) -> Codes:
    """A box of a tensor's matrix, as codes of its dtype."""
    (top, bottom), (left, right) = lines, across
    if isinstance(source, Decoded):
        values = np.empty((bottom - top, right - left), np.float32)
        return decoder.decode(shards, source, lines, across, values).values.view(np.uint32)
    if source.slices:
        return read_slices(shards, source, lines, across)
    size = DTYPES[source.dtype].bits // 8
    columns = matrix_of(source.shape)[1]
    reader = shards[source.shard]
    start = source.start + (top * columns + left) * size
    box = np.empty((bottom - top, (right - left) * size), np.uint8)
    if right - left == columns:
        with reader.window(source, start, start + box.size, box.reshape(-1)) as view:
            if not np.shares_memory(view, box):
                box.reshape(-1)[:] = view
    else:
        reader.read_rows(source, start, columns * size, box)
    return box.view(f"u{size}")


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


@lru_cache(maxsize=64)
def _all_runs(weight: Assembled | TensorInfo) -> tuple[Run, ...] | None:
    """All elements in runs, in order; None if some are not contiguous, decoded, or in too short runs."""
    pieces = weight.pieces if isinstance(weight, Assembled) else pieces_of(weight)
    runs: list[Run] = []
    for piece in pieces or ():
        found = _runs(weight.shape, piece)
        if found is None:
            return None
        runs += found
    return None if pieces is None else tuple(sorted(runs))


def _runs(shape: tuple[int, ...], piece: Piece) -> list[Run] | None:
    if piece.transposed or not isinstance(piece.source, TensorInfo) or piece.source.slices:
        return None
    base, tuned = (_spans(*side) for side in ((shape, piece.base_index), (piece.source.shape, piece.tuned_index)))
    if base is None or tuned is None:
        return None
    count = min(base[1], tuned[1])
    if count < min(_SHORTEST, math.prod(shape)) or base[1] % count or tuned[1] % count:
        return None
    starts = ([start + at for start in starts for at in range(0, length, count)] for starts, length in (base, tuned))
    return [Run(ours, piece.source, theirs, count) for ours, theirs in zip(*starts, strict=True)]


def _spans(shape: tuple[int, ...], index: tuple[Range, ...]) -> tuple[list[int], int] | None:
    """Where a box lies in a tensor: the starts of spans of one length; None if it has a step."""
    if any(step != 1 for _, _, step in index):
        return None
    length, whole = 1, len(shape)
    while whole and index[whole - 1][:2] == (0, shape[whole - 1]):
        whole -= 1
        length *= shape[whole]
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    begin = 0
    if whole:
        start, stop, _ = index[whole - 1]
        length *= stop - start
        begin = start * strides[whole - 1]
    ahead = itertools.product(*(range(*index[axis]) for axis in range(whole - 1))) if whole else [()]
    starts = [begin + sum(at * stride for at, stride in zip(places, strides, strict=False)) for places in ahead]
    return starts, length


@lru_cache(maxsize=64)
def _boxes(weight: Assembled) -> tuple[_Box, ...]:
    boxes = []
    for piece in weight.pieces:
        ours, theirs = _corners(weight.shape, piece.base_index), _corners(piece.source.shape, piece.tuned_index)
        rows, columns = (len(range(*axis)) for axis in ((0, 1, 1), *piece.base_index)[-2:])
        for base, tuned in zip(ours, theirs, strict=True):
            boxes.append(_Box(rows, columns, base, tuned, piece.source, piece.transposed))
    return tuple(boxes)


def _corners(shape: tuple[int, ...], index: tuple[Range, ...]) -> list[_Corner]:
    """Where a box begins in each matrix of the last two axes that it touches."""
    while len(shape) < 2:
        shape, index = (1, *shape), ((0, 1, 1), *index)
    (top, _, down), (left, _, right) = index[-2:]
    strides = [math.prod(shape[axis + 1 : -1]) for axis in range(len(shape) - 2)]
    return [
        _Corner(sum(at * stride for at, stride in zip(place, strides, strict=True)) + top, down, left, right)
        for place in itertools.product(*(range(*axis) for axis in index[:-2]))
    ]
