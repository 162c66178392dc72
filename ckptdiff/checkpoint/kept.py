"""Count what two sides of a weight have in common besides their values: codes, scales, and steps of their grids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ckptdiff.checkpoint.code_formats import CODES
from ckptdiff.checkpoint.decoding import Box, BoxScales, Floats
from ckptdiff.checkpoint.kernels.code_values import count_equal_codes, count_within_steps

__all__ = ["Kept", "count_kept", "count_scales", "same_grid"]

_BY_DIVISION = np.float32(2.0**-22)
"""How much a scale times s and one over 1 / s may differ, each rounded to float32, and s too."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What two sides of a weight have in common, once at least one is quantised; boxes add up.

    Attributes
    ----------
    values : int
        Compared.
    equal_codes : int or None
        None where the formats of codes differ, or a side has none.
    scales, equal_scales : int or None
        Scales, and those that are equal as values, with the global scale. None where the grids differ.
    changed : int
        Values that differ.
    within : int
        Values that differ by no more than the larger step of both sides there: |v0 - v1| <= max(s0, s1), s being the
        distance from the code to the next one of larger magnitude (of the largest: from the one before), times its
        scale. A side that is not quantised has no step.
    """

    values: int
    equal_codes: int | None
    scales: int | None
    equal_scales: int | None
    changed: int
    within: int

    def __add__(self, other: Kept) -> Kept:
        """What both boxes have."""
        return Kept(
            self.values + other.values,
            _sum(self.equal_codes, other.equal_codes),
            _sum(self.scales, other.scales),
            _sum(self.equal_scales, other.equal_scales),
            self.changed + other.changed,
            self.within + other.within,
        )


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def count_kept(base: Box | Floats, tuned: Box | Floats, *, as_bf16: bool) -> Kept:
    """Count what two sides of a box have in common.

    Parameters
    ----------
    base, tuned : Box or float32 array, shape (rows, columns), C-contiguous
        The same values; at least one side is a Box, decoded with `detail`.
    as_bf16 : bool
        Whether values differ only if they do once they are rounded to bfloat16.
    """
    boxes = [side for side in (base, tuned) if isinstance(side, Box)]
    ours, theirs = ((side.values if isinstance(side, Box) else side).reshape(-1) for side in (base, tuned))
    steps = [side.steps.reshape(-1) for side in boxes if side.steps is not None]
    changed, within = count_within_steps(ours, theirs, steps[0], steps[-1], as_bf16)
    codes = scales = equal = None
    if len(boxes) == 2:
        one, other = boxes
        if one.weight.code == other.weight.code and one.fields is not None and other.fields is not None:
            zero = CODES[one.weight.code].magnitude
            codes = count_equal_codes(one.fields.reshape(-1), other.fields.reshape(-1), zero)
        scales, equal = count_scales(one, other)
    return Kept(ours.size, codes, scales, equal, changed, within)


def count_scales(base: BoxScales, tuned: BoxScales) -> tuple[int, int] | tuple[None, None]:
    """How many scales there are, and how many are equal as values; None where the grids differ."""
    return (base.scales.size, _equal(base, tuned)) if same_grid(base, tuned) else (None, None)


def same_grid(base: BoxScales, tuned: BoxScales) -> bool:
    """Whether the blocks of both sides are the same there."""
    return all(
        ours.size == theirs.size and bool((ours == theirs).all())
        for ours, theirs in zip(base.starts, tuned.starts, strict=True)
    )


def _equal(base: BoxScales, tuned: BoxScales) -> int:
    """How many scales are equal; where just one side divides, up to what rounding does to one over a global scale."""
    with np.errstate(invalid="ignore"):
        if base.weight.divides == tuned.weight.divides:
            return int(np.count_nonzero(base.scales == tuned.scales))
        larger = np.maximum(np.abs(base.scales), np.abs(tuned.scales))
        return int(np.count_nonzero(np.abs(base.scales - tuned.scales) <= _BY_DIVISION * larger))
