"""Read one tensor again, block by block, and hold it to the norm that a run saw, since headers tell sizes only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import TensorInfo
from ckptdiff.checkpoint.blocks import blocks_of, values_of
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.errors import CheckpointError
from ckptdiff.figures.result import Diff
from ckptdiff.formats import FORMATS, Format, recode_table, round_to_bf16, stored_format

__all__ = ["KnownNorm", "checked_blocks", "known_norms"]

_SUMMED = 1e-9
"""Sums of the same squares differ by less of their size, whatever machine summed them."""
_ROUNDED = 2.0**-22
"""A difference in float32 is off by 2^-24 of itself; twice that where it is multiplied, and twice again for room."""


@dataclass(frozen=True, slots=True)
class KnownNorm:
    """What a run knows of a tensor of one side.

    Attributes
    ----------
    side : str
        "base" or "tuned".
    compare : str
        Format that the values were cast to before their norm was taken.
    square : float
        The square of that norm; NaN if the run does not know it, because of NaN or Inf on either side.
    tolerance : float
        By how much the square of equal values may differ from it.
    """

    side: Literal["base", "tuned"]
    compare: str
    square: float
    tolerance: float


def known_norms(diff: Diff, side: Literal["base", "tuned"]) -> dict[str, KnownNorm]:
    """What a run knows of a side, by the base's names of its tensors."""
    columns = diff.columns
    with np.errstate(over="ignore", invalid="ignore"):
        base, delta = columns["base_norm"], columns["delta_norm"]
        if side == "base":
            squares = np.square(base)
            tolerances = _SUMMED * squares
        else:
            # W1 = W0 + d
            squares = np.square(base) + 2 * columns["base_dot_delta"] + np.square(delta)
            tolerances = _SUMMED * (np.square(base) + np.square(delta)) + _ROUNDED * delta * (base + delta)
        squares = np.where(columns["finite"] == columns["numel"], squares, math.nan)
    return {
        facts.name: KnownNorm(side, facts.compare, square, tolerance)
        for facts, square, tolerance in zip(diff.tensors, squares.tolist(), tolerances.tolist(), strict=True)
    }


def checked_blocks(shards: OpenShards, tensor: TensorInfo, known: KnownNorm | None) -> Iterator[NDArray[np.uint8]]:
    """Stored bytes as `blocks_of` yields them, and a look at the norm, unless `known` is None.

    Raises
    ------
    CheckpointError
        After the last block, if the tensor has another norm than the run has measured.
    """
    if known is None or not math.isfinite(known.square + known.tolerance):
        yield from blocks_of(shards, tensor)
        return
    compare = FORMATS[known.compare]
    square = 0.0
    for stored in blocks_of(shards, tensor):
        with np.errstate(over="ignore", invalid="ignore"):
            square += float(np.square(_cast(tensor.dtype, stored, compare), dtype=np.float64).sum())
        yield stored
    if not abs(square - known.square) <= known.tolerance:
        raise CheckpointError(
            f"not the {known.side} checkpoint that the run compared: its headers are the same, but other values",
            file=tensor.shard.path,
            tensor=tensor.name,
            expected=f"norm {math.sqrt(max(known.square, 0.0))!r}",
            found=f"norm {math.sqrt(square)!r}",
            hint=f"name the {known.side} checkpoint of that run with --{known.side}, or run ckptdiff diff again",
        )


def _cast(dtype: str, stored: NDArray[np.uint8], compare: Format) -> NDArray[np.floating]:
    """Values after the cast to the compare format."""
    format = stored_format(dtype)
    if format == compare:
        return values_of(dtype, stored)
    if format.bits <= 16:
        codes: NDArray[np.unsignedinteger] = recode_table(format, compare)[stored.view(format.code_dtype)]
    elif compare.name == "bf16":
        codes = round_to_bf16(values_of(dtype, stored).astype(np.float32).view(np.uint32))
    else:
        codes = values_of(dtype, stored).astype(f"f{compare.bits // 8}").view(compare.code_dtype)
    if compare.bits <= 16:
        narrow: NDArray[np.floating] = compare.values()[codes]
        return narrow
    wide: NDArray[np.floating] = codes.view(f"f{compare.bits // 8}")
    return wide
