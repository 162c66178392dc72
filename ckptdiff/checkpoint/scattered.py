"""Put tensors together of slices: those that several ranks wrote, or one whose elements lie at strides of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ckptdiff.checkpoint.dtypes import DTYPES
from ckptdiff.checkpoint.header import Shard, Slice, TensorInfo
from ckptdiff.checkpoint.weights import Piece
from ckptdiff.errors import CheckpointError

__all__ = ["as_stored", "pieces_of"]


def _packed(sizes: Sequence[int]) -> tuple[int, ...]:
    """How far apart the elements of a tensor lie along each axis if they lie in one run, in order."""
    return tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))


def _is_packed(one: Slice) -> bool:
    """Whether its elements lie in one run, in order."""
    packed = _packed(one.sizes)
    return all(size <= 1 or ours == theirs for size, ours, theirs in zip(one.sizes, one.strides, packed, strict=True))


def as_stored(name: str, dtype: str, shape: tuple[int, ...], slices: Sequence[Slice], shard: Shard) -> TensorInfo:
    """Make a tensor of its slices.

    Parameters
    ----------
    name, dtype, shape
        Of the whole.
    slices : sequence of Slice
        Those that are the same box as one before them, as of ranks that hold the same, are left out.
    shard : Shard
        A file of the checkpoint, for messages, and for a tensor without elements.

    Raises
    ------
    CheckpointError
        Slices that overlap, leave gaps, or lie beyond the tensor.
    """
    kept = {one.offsets + one.sizes: one for one in reversed(slices) if math.prod(one.sizes)}
    boxes = sorted(kept.values(), key=lambda one: one.offsets)
    outside = next((one for one in boxes if any(map(_is_beyond, one.offsets, one.sizes, shape))), None)
    if outside is not None:
        raise _misfit(
            "a slice lies beyond the tensor", name, outside.shard, f"a box of shape {list(shape)}", _told(outside)
        )
    for one, other in _overlapping(boxes):
        found = f"{_told(one)} of {one.shard.path} and {_told(other)}"
        raise _misfit("two slices of the tensor overlap", name, other.shard, "slices that share no element", found)
    numel, held = math.prod(shape), sum(math.prod(one.sizes) for one in boxes)
    if held != numel:
        raise _misfit(
            "slices of the tensor are missing",
            name,
            boxes[0].shard if boxes else shard,
            f"slices of all {numel} elements of shape {list(shape)}",
            f"{held} elements in {len(boxes)} slices",
            "name the folder that holds the files of all ranks; a save or a copy may be incomplete",
        )
    if len(boxes) > 1 or (boxes and not _is_packed(boxes[0])):
        return TensorInfo(name, dtype, shape, boxes[0].shard, 0, 0, tuple(boxes))
    if not boxes:
        return TensorInfo(name, dtype, shape, shard, 0, 0)
    start = boxes[0].start
    return TensorInfo(name, dtype, shape, boxes[0].shard, start, start + numel * DTYPES[dtype].bits // 8)


def _overlapping(boxes: Sequence[Slice]) -> Iterator[tuple[Slice, Slice]]:
    """Pairs that share an element; along the axis that is cut most, few are open at once."""
    axis = max(range(len(boxes[0].offsets)), key=lambda at: len({one.offsets[at] for one in boxes})) if boxes[1:] else 0
    opened: list[Slice] = []
    for one in sorted(boxes, key=lambda box: box.offsets[axis]) if boxes[1:] else ():
        opened = [box for box in opened if box.offsets[axis] + box.sizes[axis] > one.offsets[axis]]
        yield from ((box, one) for box in opened if all(map(_meet, box.offsets, box.sizes, one.offsets, one.sizes)))
        opened.append(one)


def _meet(first: int, size: int, second: int, other: int) -> bool:
    return first < second + other and second < first + size


def _is_beyond(offset: int, size: int, whole: int) -> bool:
    return not 0 <= offset <= offset + size <= whole


def _told(one: Slice) -> str:
    return "[" + ", ".join(f"{at}:{at + size}" for at, size in zip(one.offsets, one.sizes, strict=True)) + "]"


def _misfit(
    problem: str, name: str, shard: Shard, expected: str, found: str, hint: str = "save it again, or convert it"
) -> CheckpointError:
    return CheckpointError(problem, file=shard.path, tensor=name, expected=expected, found=found, hint=hint)


def pieces_of(tensor: TensorInfo) -> list[Piece] | None:
    """The slices of a tensor as pieces of it, each of a tensor of its own; None if one is not in one run."""
    if not all(map(_is_packed, tensor.slices)):
        return None
    pieces = []
    for one in tensor.slices:
        stop = one.start + math.prod(one.sizes) * DTYPES[tensor.dtype].bits // 8
        source = TensorInfo(tensor.name, tensor.dtype, one.sizes, one.shard, one.start, stop)
        index = tuple((at, at + size, 1) for at, size in zip(one.offsets, one.sizes, strict=True))
        pieces.append(Piece(source, index, tuple((0, size, 1) for size in one.sizes)))
    return pieces
