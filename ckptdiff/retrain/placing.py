"""Put the mask of a tensor where its pieces are in the parameters of a model that has another layout."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint.weights import Piece, Range
from ckptdiff.retrain.kernels.mask_bits import add_bits

_Axes = list[tuple[int, int]]
"""Entries along each axis of a box, and how many coordinates lie between two of them."""


def place(bits: NDArray[np.uint8], shape: tuple[int, ...], piece: Piece, out: NDArray[np.uint8]) -> int:
    """Set the bits of a piece in the packed mask of a parameter.

    Parameters
    ----------
    bits : uint8 array, shape (ceil(numel / 8),)
        The packed mask of a tensor of that `shape`.
    shape : tuple of int
    piece : Piece
        A box of that tensor, and the box of a parameter, its `source`, that holds the same weights.
    out : uint8 array, shape (ceil(piece.source.numel / 8),)
        The packed mask of the parameter; receives the bits beside those that it holds.

    Returns
    -------
    int
        Coordinates of the piece, set or not.
    """
    start, ours = _box(shape, piece.base_index)
    to, theirs = _box(piece.source.shape, piece.tuned_index)
    if piece.transposed:
        theirs[-2:] = theirs[:-3:-1]
    # Axes of one entry may be on one side only.
    ours, theirs = ([axis for axis in axes if axis[0] != 1] for axes in (ours, theirs))
    assert [count for count, _ in ours] == [count for count, _ in theirs]
    joined = _joined(ours, theirs)
    *ahead, (rows, down, below), (columns, right, beside) = [(1, 0, 0), (1, 0, 0), *joined]
    for places in itertools.product(*(range(count) for count, _, _ in ahead)):
        mine = start + sum(at * step for at, (_, step, _) in zip(places, ahead, strict=True))
        other = to + sum(at * step for at, (_, _, step) in zip(places, ahead, strict=True))
        add_bits(bits, mine, down, right, out, other, below, beside, rows, columns)
    return math.prod(count for count, _ in ours)


def _box(shape: tuple[int, ...], index: tuple[Range, ...]) -> tuple[int, _Axes]:
    """Where a box begins in a tensor, row-major, and its axes."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    start = sum(first * stride for (first, _, _), stride in zip(index, strides, strict=True))
    return start, [(len(range(*one)), one[2] * stride) for one, stride in zip(index, strides, strict=True)]


def _joined(ours: _Axes, theirs: _Axes) -> list[tuple[int, int, int]]:
    """Axes with the steps on both sides; those that follow each other without a gap on both are one."""
    joined: list[tuple[int, int, int]] = []
    for (count, down), (_, below) in zip(ours[::-1], theirs[::-1], strict=True):
        if joined:
            inner, right, beside = joined[0]
            if (down, below) == (inner * right, inner * beside):
                joined[0] = (count * inner, right, beside)
                continue
        joined.insert(0, (count, down, below))
    return joined
