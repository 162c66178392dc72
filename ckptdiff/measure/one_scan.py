"""Pick the small tensors that one scan can measure to the end, without a measurement of their own."""

from __future__ import annotations

from functools import cache

import numpy as np

from ckptdiff.figures.catalogue import TAU
from ckptdiff.figures.columns import log2_groups
from ckptdiff.formats import Format
from ckptdiff.measure.kernels.row import Wanted
from ckptdiff.measure.low_cuts import first_nan_bin
from ckptdiff.measure.rounding_null import half_gaps
from ckptdiff.options import MaskRule

__all__ = ["one_scan_suffices", "wanted"]


def one_scan_suffices(compare: Format, rule: MaskRule) -> bool:
    """Whether most tensors need no further pass: those of at most 16 bits, unless the mask needs figures first."""
    return compare.bits <= 16 and rule.kind in ("none", "bitwise", "abs", "eta")


@cache
def wanted(compare: Format) -> Wanted:
    """What to find in the histograms of tensors of a compare format, and the tables that it takes."""
    groups = log2_groups("f32"), log2_groups(compare.name)
    return Wanted(np.array(TAU), first_nan_bin(compare), *groups, half_gaps(compare.name))
