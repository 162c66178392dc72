"""Declare every stored column and every printed figure, one row each.

A *column* is what the run file stores per tensor: integer counts and the few floats that groups can be made from.
A *figure* is what is printed, for one tensor or for any group of them; it is computed from columns by one small
function over a :class:`~ckptdiff.figures.grouping.Grouping`. JSON keys, HDF5 datasets, csv headers and the docs derive
from these two tables, so a new figure is one row and one function here.

Formulas and sources: S1 is arXiv 2606.13657, S2 arXiv 2505.11711, S3 arXiv 2511.08567, S4 arXiv 2606.07082, PULSE
arXiv 2602.03839, which counts coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from ckptdiff.figures.grouping import FloatArray, Grouping
from ckptdiff.measure.thresholds import EPS, ETA, RHO, TAU, P

_ROUNDING = 1e-13
"""What sums in float64 over equal and opposite terms may leave of them."""
_SHORT_INDEX = 1 << 31
"""Coordinates that a patch can point at with four bytes."""
_SHORTEST = 1e-5
"""Ratio of two norms below which their cosine is undefined: float32 differences would leave it a few digits or none."""

Unit = Literal["fraction", "norm", "count", "value", "cosine"]


@dataclass(frozen=True, slots=True)
class StoredColumn:
    """One stored quantity per tensor: a dataset under ``/tensors`` of the run file."""

    name: str
    dtype: Literal["uint64", "float64"]
    units: str
    long_name: str


@dataclass(frozen=True, slots=True)
class Figure:
    """One printed figure.

    ``value(groups, parameter)`` returns one float per group, NaN where the figure is undefined; ``parameter`` is None
    for a figure without parameters.
    """

    key: str
    unit: Unit
    long_name: str
    source: str
    value: Callable[[Grouping, float | None], FloatArray]
    parameters: tuple[float, ...] = ()
    bitwise: bool = False
    """Defined for integer and opaque tensors too, where only bit equality is measured."""
    of_base: bool = False
    """Needs the base's values, and so is unknown where a tensor was not read because nothing of it changed."""


def parameter_key(parameter: float) -> str:
    """Spell a parameter as a JSON key: ``%g``, so "0", "1e-05", "0.1"."""
    return f"{parameter:g}"


@cache
def flat_key(key: str, parameter: float | None) -> str:
    """Name of the flat column of a figure and its parameter, such as ``unchanged_abs_1e-05``."""
    return key if parameter is None else f"{key}_{parameter_key(parameter)}"


def flat_keys(figure: Figure) -> Iterator[tuple[float | None, str]]:
    """Yield (parameter, flat key) for every value a figure has."""
    if not figure.parameters:
        yield None, figure.key
    for parameter in figure.parameters:
        yield parameter, flat_key(figure.key, parameter)


def _counts() -> Iterator[StoredColumn]:
    def count(name: str, long_name: str) -> StoredColumn:
        return StoredColumn(name, "uint64", "1", long_name)

    yield count("numel", "coordinates in the tensor")
    yield count("valued", "1 if the tensor holds floating values, 0 if only its bits are compared")
    yield count("finite", "coordinates whose delta is finite: those in the sums")
    yield count("unchanged_bitwise", "coordinates with equal bits after the cast, +0 equal to -0")
    yield count("wide", "1 if a side is stored wider than the compare dtype")
    yield count("off_grid", "coordinates whose base the compare dtype does not hold, NaN left out")
    yield StoredColumn("on_grid", "uint64", "1", "1 if there are none of those")
    yield count("unchanged_stored", "coordinates with equal values as stored, before the cast")
    yield count("unchanged_eta", f"coordinates with |d| <= {ETA:g} max(|W0|, |W1|)")
    for eps in EPS:
        yield count(flat_key("unchanged_abs", eps), f"coordinates with |d| <= {eps:g}")
    for tau in TAU:
        yield count(flat_key("unchanged_rel", tau), f"coordinates with |d| <= {tau:g} RMS(W0)")
    yield count("changed", "coordinates in the mask")
    yield count("masked", "1 if the mask rule was applied, 0 if there is no mask rule")
    yield count("support", "coordinates changed bitwise whose base is not NaN: the denominator of low_coverage")
    yield count("nonfinite_base", "NaN and Inf in the base, as stored")
    yield count("nonfinite_tuned", "NaN and Inf in the tuned side, as stored")


def _floats() -> Iterator[StoredColumn]:
    def real(name: str, long_name: str, units: str = "1") -> StoredColumn:
        return StoredColumn(name, "float64", units, long_name)

    yield real("delta_norm", "Frobenius norm of d = W1 - W0")
    yield real("base_norm", "Frobenius norm of W0")
    yield real("base_dot_delta", "sum of W0 d")
    yield real("delta_sum", "sum of d")
    yield real("l1", "sum of |d|")
    yield real("max_abs", "largest |d|")
    yield real("unchanged_null", "share that Gaussian noise of the norm of d, rounded to the grid, leaves unchanged")
    yield real("stored_norm", "Frobenius norm of d before the cast")
    yield real("absorbed_norm", "Frobenius norm of that part of it which vanishes in the cast")
    for p in P:
        yield real(flat_key("coord_energy", p), f"share of sum d^2 held by the {p:g} % largest |d|")
    for rho in RHO:
        yield real(flat_key("low_coverage", rho), f"share of the support in the {rho:g} N smallest |W0|")
    for rho in RHO:
        yield real(
            flat_key("low_coverage_null", rho), f"low_coverage of a Gaussian update of the same size, rho {rho:g}"
        )


COLUMNS: tuple[StoredColumn, ...] = (*_counts(), *_floats())
"""Every stored column, counts first."""


def _fraction(groups: Grouping, column: str) -> FloatArray:
    return groups.ratio(groups.total(column), groups.total("numel"))


def _share(key: str) -> Callable[[Grouping, float | None], FloatArray]:
    return lambda groups, parameter: _fraction(groups, flat_key(key, parameter))


def _total(column: str) -> Callable[[Grouping, float | None], FloatArray]:
    return lambda groups, _: groups.total(column)


def _if_finite(groups: Grouping, column: str, values: FloatArray) -> FloatArray:
    """Values of the groups in which a column, made of sums, stayed within float64 for each tensor."""
    return np.where(np.isfinite(groups.total(column)), values, np.nan)


def _if_any(groups: Grouping, values: FloatArray) -> FloatArray:
    """Values of the groups in which some d is finite; elsewhere a sum of nothing would read as no change."""
    return np.where(groups.total("finite") > 0, values, np.nan)


def _unchanged_rel(groups: Grouping, tau: float | None) -> FloatArray:
    # Every |d| is within an infinite RMS(W0).
    return _if_finite(groups, "base_norm", _fraction(groups, flat_key("unchanged_rel", tau)))


def _unchanged_stored(groups: Grouping, _: float | None) -> FloatArray:
    return np.where(groups.total("wide") > 0, _fraction(groups, "unchanged_stored"), np.nan)


def _absorbed(groups: Grouping, _: float | None) -> FloatArray:
    share = groups.ratio(groups.total_square("absorbed_norm"), groups.total_square("stored_norm"))
    return np.where(groups.total("wide") > 0, share, np.nan)


def _changed(groups: Grouping, _: float | None) -> FloatArray:
    return np.where(groups.total("masked") > 0, groups.total("changed"), np.nan)


def _patch_bytes(groups: Grouping, _: float | None) -> FloatArray:
    numel = groups.column("numel")
    equal = np.where(groups.column("wide") > 0, groups.column("unchanged_stored"), groups.column("unchanged_bitwise"))
    index = np.where(numel > _SHORT_INDEX, 8, 4)
    return groups.total_if_known((numel - equal) * (groups.column("value_bytes") + index))


def _dense_bytes(groups: Grouping, _: float | None) -> FloatArray:
    return groups.total_if_known(groups.column("numel") * groups.column("value_bytes"))


def _base_square(groups: Grouping) -> FloatArray:
    return groups.total_square("base_norm")


def _delta_square(groups: Grouping) -> FloatArray:
    return groups.total_square("delta_norm")


def _delta_norm(groups: Grouping, _: float | None) -> FloatArray:
    return _if_any(groups, np.sqrt(_delta_square(groups)))


def _base_norm(groups: Grouping, _: float | None) -> FloatArray:
    return _if_any(groups, np.sqrt(_base_square(groups)))


def _rel_norm(groups: Grouping, _: float | None) -> FloatArray:
    return np.sqrt(groups.ratio(_delta_square(groups), _base_square(groups)))


def _tuned_norm(groups: Grouping, _: float | None = None) -> FloatArray:
    base = _base_square(groups)
    square = base + 2 * groups.total("base_dot_delta") + _delta_square(groups)
    # What is left of a tensor that was set to zero is rounding.
    return _if_any(groups, np.sqrt(np.where(groups.ratio(square, base) <= _ROUNDING, 0.0, square)))


def _cosine(groups: Grouping, _: float | None) -> FloatArray:
    # 1 - cos from sums over d, so that it is right near 1e-6, where the quotient of dot products is all rounding.
    base, tuned = np.sqrt(_base_square(groups)), _tuned_norm(groups)
    growth = groups.ratio(2 * groups.total("base_dot_delta") + _delta_square(groups), base + tuned)
    cosine = 1.0 - groups.ratio(_delta_square(groups) - growth**2, 2 * base * tuned)
    # Beside a far longer vector those sums say nothing of the direction of the shorter one.
    known = np.minimum(base, tuned) >= _SHORTEST * np.maximum(base, tuned)
    return np.where(known, np.clip(cosine, -1.0, 1.0), np.nan)


def _delta_energy_share(groups: Grouping, _: float | None) -> FloatArray:
    return _if_any(groups, groups.ratio(_delta_square(groups), np.full(groups.size, groups.delta_energy)))


def _coord_energy(groups: Grouping, p: float | None) -> FloatArray:
    return _if_finite(groups, "delta_norm", groups.mean(flat_key("coord_energy", p), groups.squares("delta_norm")))


def _l1(groups: Grouping, _: float | None) -> FloatArray:
    return _if_any(groups, groups.total("l1"))


def _max_abs(groups: Grouping, _: float | None) -> FloatArray:
    return _if_any(groups, groups.largest("max_abs"))


def _mean(groups: Grouping, _: float | None) -> FloatArray:
    # A sum of infinities of both signs is NaN, which no total holds; that of |d| is infinite then.
    return _if_finite(groups, "l1", groups.ratio(groups.total("delta_sum"), groups.total("finite")))


def _coverage(key: str) -> Callable[[Grouping, float | None], FloatArray]:
    return lambda groups, rho: groups.mean(flat_key(key, rho), groups.column("support"))


FIGURES: tuple[Figure, ...] = (
    Figure(
        "unchanged_bitwise",
        "fraction",
        "equal bits after the cast",
        "S3, S4",
        _share("unchanged_bitwise"),
        bitwise=True,
    ),
    Figure(
        "unchanged_null",
        "fraction",
        "the same for Gaussian noise of the update's norm, rounded to the grid",
        "ckptdiff",
        lambda groups, _: groups.mean("unchanged_null", groups.column("numel")),
        of_base=True,
    ),
    Figure("unchanged_stored", "fraction", "equal values as stored", "ckptdiff", _unchanged_stored),
    Figure("absorbed_energy", "fraction", "share of the stored sum d^2 that vanishes in the cast", "PULSE", _absorbed),
    Figure("unchanged_eta", "fraction", f"|d| <= {ETA:g} max(|W0|, |W1|)", "S3", _share("unchanged_eta")),
    Figure("unchanged_abs", "fraction", "|d| <= eps", "S1, S2", _share("unchanged_abs"), EPS),
    Figure("unchanged_rel", "fraction", "|d| <= tau RMS(W0)", "S1", _unchanged_rel, TAU),
    Figure("changed", "count", "coordinates in the mask", "ckptdiff", _changed, bitwise=True),
    Figure("patch_bytes", "count", "index and tuned value of each coordinate that changed", "ckptdiff", _patch_bytes),
    Figure("dense_bytes", "count", "all tuned values, as stored", "ckptdiff", _dense_bytes),
    Figure("delta_norm", "norm", "norm of d", "S1", _delta_norm),
    Figure("base_norm", "norm", "norm of W0", "S1", _base_norm, of_base=True),
    Figure("tuned_norm", "norm", "norm of W1", "S1", _tuned_norm, of_base=True),
    Figure("rel_norm", "fraction", "norm of d / norm of W0", "S1", _rel_norm, of_base=True),
    Figure("delta_energy_share", "fraction", "sum d^2 of the group / of all", "S1", _delta_energy_share),
    Figure("cosine", "cosine", "cosine of W0 and W1", "usual", _cosine, of_base=True),
    Figure("l1", "norm", "sum of |d|", "usual", _l1),
    Figure("mean", "value", "mean of d", "usual", _mean, of_base=True),
    Figure("max_abs", "value", "largest |d|", "usual", _max_abs),
    Figure("coord_energy", "fraction", "share of sum d^2 in the p % largest |d|", "S1", _coord_energy, P),
    Figure(
        "low_coverage",
        "fraction",
        "share of the support in the rho N smallest |W0|",
        "S1",
        _coverage("low_coverage"),
        RHO,
    ),
    Figure(
        "low_coverage_null",
        "fraction",
        "the same for a Gaussian update rounded to the grid",
        "ckptdiff",
        _coverage("low_coverage_null"),
        RHO,
    ),
    Figure("nonfinite_base", "count", "NaN and Inf in the base", "ckptdiff", _total("nonfinite_base"), of_base=True),
    Figure(
        "nonfinite_tuned",
        "count",
        "NaN and Inf in the tuned side",
        "ckptdiff",
        _total("nonfinite_tuned"),
        of_base=True,
    ),
)
"""Every printed figure, in the order in which it is printed."""
