"""Compare the values of two tensors: all of them, up to the first that differs, or a sample."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import DTYPES, TensorInfo
from ckptdiff.checkpoint.blocks import blocks_of, values_of
from ckptdiff.checkpoint.boxes import read_elements
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.checkpoint.weights import Weight
from ckptdiff.events import Listener, Note, Stage, stage
from ckptdiff.formats import Format, common_format, recode_table, stored_format
from ckptdiff.measure.partial import BLOCK

__all__ = ["look_for_ties", "same_values", "sampled_agreement", "sampled_likeness"]

_SAMPLES = 8
_SAMPLE = 128
"""Coordinates of each sample."""
_NEAR = 2.0**-8
"""Relative distance below which values count as equal: one step of bfloat16, so that dtypes may differ."""


def look_for_ties(shards: OpenShards, tell: Listener) -> Callable[[TensorInfo, TensorInfo], bool]:
    """Tell whether two tensors hold the same values, each two in a stage of their own.

    Parameters
    ----------
    shards : OpenShards
    tell : callable
        Told of the stages "looking for ties", in bytes.
    """

    def look(head: TensorInfo, embedding: TensorInfo) -> bool:
        tell(Note(f"reading {head.name} and {embedding.name}, to see whether they are one"))
        with stage(tell, "looking for ties", head.nbytes + embedding.nbytes, "bytes") as told:
            return same_values(shards, head, embedding, told)

    return look


def sampled_agreement(shards: OpenShards) -> Callable[[TensorInfo, TensorInfo], tuple[int, int]]:
    """Count the equal values of two floating tensors of one shape, in a few small pieces spread over them.

    Parameters
    ----------
    shards : OpenShards
        The readers of their files.

    Returns
    -------
    callable
        Two tensors to how many of the values are equal, to within a step of bfloat16, and how many were looked at.
        Those that repeat the value before them are not: constants tell nothing.
    """

    def look(one: TensorInfo, other: TensorInfo) -> tuple[int, int]:
        if one.region == other.region:
            return one.numel, one.numel
        first, second = (_sample(shards, tensor) for tensor in (one, other))
        telling = np.flatnonzero(first[1:] != first[:-1]) + 1
        one_side, other_side = first[telling], second[telling]
        with np.errstate(invalid="ignore"):  # infinities
            near = np.abs(one_side - other_side) <= _NEAR * np.maximum(np.abs(one_side), np.abs(other_side))
        return int(np.count_nonzero(near)), telling.size

    return look


def sampled_likeness(shards: OpenShards) -> Callable[[Weight, Weight], float]:
    """Compare the directions of two floating sides of one shape, in a few small pieces spread over them.

    Parameters
    ----------
    shards : OpenShards
        The readers of their files.

    Returns
    -------
    callable
        Two sides to the cosine between the values that were looked at; 0 where it is undefined.
    """

    def look(one: Weight, other: Weight) -> float:
        first, second = (_sample(shards, side).astype(np.float64) for side in (one, other))
        with np.errstate(all="ignore"):
            cosine = float(first @ second / np.sqrt((first @ first) * (second @ second)))
        return cosine if math.isfinite(cosine) else 0.0

    return look


def _sample(shards: OpenShards, weight: Weight) -> NDArray[np.floating]:
    """Values of a side in pieces at equal distances."""
    size = DTYPES[weight.dtype].bits // 8
    count = min(_SAMPLE, weight.numel)
    last = weight.numel - count
    pieces = []
    for start in dict.fromkeys(last * at // (_SAMPLES - 1) for at in range(_SAMPLES)):
        stored = np.empty(count * size, np.uint8)
        read_elements(shards, weight, start, start + count, stored)
        pieces.append(values_of(weight.dtype, stored))
    return np.concatenate(pieces)


def same_values(shards: OpenShards, first: TensorInfo, second: TensorInfo, told: Stage, block: int = BLOCK) -> bool:
    """Compare two floating tensors of one shape as ``unchanged_stored`` does.

    Both are widened to the smallest format that holds either's values. There +0 equals -0, and a NaN equals one of the
    same bits.

    Parameters
    ----------
    shards : OpenShards
        The readers of their files.
    first, second : TensorInfo
        Of any two floating dtypes, with as many elements.
    told : Stage
        Told of the bytes of both that were read.
    block : int
        Coordinates of each that are read at a time.

    Raises
    ------
    CheckpointError
        If either cannot be read, or changes.
    """
    if first.region == second.region:
        return True
    formats = stored_format(first.dtype), stored_format(second.dtype)
    common = common_format(*formats)
    for stored in zip(blocks_of(shards, first, block), blocks_of(shards, second, block), strict=True):
        told.more(sum(side.nbytes for side in stored), first.name)
        one, other = (_widened(codes, format, common) for codes, format in zip(stored, formats, strict=True))
        differ = one != other
        if differ.any() and ((one | other)[differ] & common.magnitude).any():
            return False
    return True


def _widened(stored: NDArray[np.uint8], format: Format, common: Format) -> NDArray[np.unsignedinteger]:
    codes: NDArray[np.unsignedinteger] = stored.view(format.code_dtype)
    if format == common:
        return codes
    if format.bits <= 16:
        widened: NDArray[np.unsignedinteger] = recode_table(format, common)[codes]
        return widened
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return codes.view(np.float32).astype(np.float64).view(common.code_dtype)
