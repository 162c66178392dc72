"""Declare the spectral figures, one row each, and hold those of a run as one table.

Unlike the figures of coordinates they cannot be added up over a group: groups have the unweighted median over their
native matrices with a nonzero delta, as the papers' tables do; each expert of a tensor that holds several is one.
Sources as in :mod:`ckptdiff.figures.catalogue`; RV is Roy and Vetterli 2007, and the bound is that of
:mod:`ckptdiff.linalg.krylov`, and DG is Donoho and Gavish 2014.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ckptdiff.figures.catalogue import flat_key, parameter_key
from ckptdiff.measure.thresholds import RHO

ENERGY_RANKS = (1, 2, 4, 8, 16, 32, 64)
"""Ranks of ``topk_energy``; the headline is 16 (S1)."""
RANK_TAU = (1e-6, 1e-5, 1e-4)
"""Thresholds of ``numerical_rank`` in units of the largest singular value (S1)."""
TOP_P = (1.0, 5.0, 10.0)
"""Percentages of the singular values of ``topp_energy`` (S1's script)."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SpectralFigure:
    """One spectral figure of a matrix; ``exact`` if only exact mode finds it."""

    key: str
    unit: Literal["fraction", "count", "value"]
    long_name: str
    source: str
    parameters: tuple[float, ...] = ()
    exact: bool = False


def _principal(key: str, long_name: str, source: str = "S1") -> SpectralFigure:
    return SpectralFigure(key, "fraction", long_name, source, RHO)


def _rotation(key: str, long_name: str) -> SpectralFigure:
    return SpectralFigure(key, "fraction", long_name, "S1", RHO, exact=True)


SPECTRAL_FIGURES: tuple[SpectralFigure, ...] = (
    SpectralFigure("topk_energy", "fraction", "share of norm(d)^2 in the first k singular values", "S1", ENERGY_RANKS),
    SpectralFigure("topk_energy_bound", "fraction", "how much larger it can be at most", "ckptdiff", ENERGY_RANKS),
    SpectralFigure("error_bound", "fraction", "that bound at the headline rank, 16", "ckptdiff"),
    SpectralFigure("stable_rank", "value", "norm(d)^2 / s_1^2", "S1"),
    SpectralFigure("effective_rank", "value", "exp of the entropy of s / sum s", "RV", exact=True),
    SpectralFigure("numerical_rank", "count", "singular values above tau s_1, at least", "S1", RANK_TAU, exact=True),
    SpectralFigure("numerical_rank_high", "count", "the same, at most", "S1", RANK_TAU, exact=True),
    SpectralFigure("numerical_rank_frac", "fraction", "numerical_rank / min(m, n)", "S1", RANK_TAU, exact=True),
    SpectralFigure("topp_energy", "fraction", "share of norm(d)^2 in the first p % of them", "S1", TOP_P, exact=True),
    SpectralFigure("dg_rank", "count", "singular values above the hard threshold for noise", "DG", exact=True),
    SpectralFigure("dg_energy", "fraction", "share of norm(d)^2 in these", "DG", exact=True),
    SpectralFigure("nss", "fraction", "norm(s(W1) - s(W0)) / norm(s(W0))", "S3", exact=True),
    SpectralFigure("spectral_drift", "value", "the same in units of norm(d) / norm(W0)", "S1", exact=True),
    _principal("principal_energy", "share of norm(d)^2 in the top singular subspaces of W0"),
    _principal("principal_energy_left", "the same, left subspace alone"),
    _principal("principal_energy_right", "the same, right subspace alone"),
    _principal("principal_gap", "gap after the last singular vector taken, in units of lambda_1", "ckptdiff"),
    _principal("principal_coverage", "share of the support on the rho N principal weights"),
    _principal("principal_coverage_null", "the same for a Gaussian update rounded to the grid", "ckptdiff"),
    _principal("principal_coverage_abs", "the same for |d| > 1e-5"),
    _principal("principal_not_low", "share of the support on principal and not among the rho N smallest weights", "S3"),
    _principal("principal_not_low_abs", "the same for |d| > 1e-5"),
    _principal("low_coverage_abs", "share of |d| > 1e-5 in the rho N smallest |W0|"),
    SpectralFigure("angle_left", "value", "largest angle between left subspaces, in radians", "S3, S4", exact=True),
    SpectralFigure("angle_left_mean", "value", "mean of these angles", "S3, S4", exact=True),
    SpectralFigure("angle_right", "value", "largest angle between right subspaces, in radians", "S3, S4", exact=True),
    SpectralFigure("angle_right_mean", "value", "mean of these angles", "S3, S4", exact=True),
    _rotation("top_subspace_rotation_left", "mean sine of the angles between top left subspaces of W0 and W1"),
    _rotation("top_subspace_rotation_right", "the same of right ones"),
)
"""Every spectral figure, in the order in which it is printed."""


def spectral_keys(figure: SpectralFigure) -> Iterator[tuple[float | None, str]]:
    """Yield (parameter, flat key) for every value a figure has."""
    for parameter in figure.parameters or (None,):
        yield parameter, flat_key(figure.key, parameter)


SPECTRAL_KEYS = tuple(key for figure in SPECTRAL_FIGURES for _, key in spectral_keys(figure))
"""Flat key of every spectral figure."""


@dataclass(frozen=True, slots=True, eq=False)
class Spectra:
    """The spectral figures of all tensors of a diff."""

    mode: str
    """As asked for: "randomized" or "exact"."""
    columns: Mapping[str, Floats]
    """By flat key (:data:`SPECTRAL_KEYS`); the median over its slices for a tensor of several matrices. Shape
    (tensors,)."""
    methods: tuple[str, ...]
    """How each tensor was measured: "randomized", "exact", or "" if it was not."""
    reasons: tuple[str, ...]
    """Why figures of a tensor are missing; empty if none is."""
    matrices: NDArray[np.int64]
    """How many matrices a tensor is made of; shape (tensors,)."""
    ranks: NDArray[np.int64]
    """How many singular values of its update are known; shape (tensors,)."""
    experts: Mapping[int, Floats] = field(default_factory=dict)
    """By row, for each tensor of several matrices, the figures of each in the order of :data:`SPECTRAL_KEYS`, shape
    (matrices, figures); all NaN where it was not measured. Run files of 0.1.0 lack them."""

    @classmethod
    def empty(cls, mode: str, tensors: int) -> Spectra:
        """A table without a single figure."""
        return cls(
            mode,
            {key: np.full(tensors, math.nan) for key in SPECTRAL_KEYS},
            ("",) * tensors,
            ("",) * tensors,
            np.zeros(tensors, np.int64),
            np.zeros(tensors, np.int64),
        )

    def tensor(self, row: int) -> dict[str, Any] | None:
        """Figures of one tensor as the output contract writes them, None for a tensor without matrices."""
        if not self.matrices[row]:
            return None
        head: dict[str, Any] = {
            "method": self.methods[row] or None,
            "rank": int(self.ranks[row]),
            "matrices": int(self.matrices[row]),
            "reason": self.reasons[row] or None,
        }
        whole = self.matrices[row] == 1
        return head | _cells({key: float(values[row]) for key, values in self.columns.items()}, whole=bool(whole))

    def measured(self, row: int) -> int:
        """How many matrices of a tensor have figures."""
        if row not in self.experts:
            return int(bool(self.methods[row]))
        return int(np.count_nonzero(~np.isnan(self.experts[row]).all(1)))

    def median(self, rows: Sequence[int] | NDArray[np.intp]) -> dict[str, Any]:
        """Unweighted medians over the matrices of the given tensors, and how many of them were measured."""
        chosen = np.asarray(rows, np.intp).tolist()
        stacks = [self.experts[row] for row in chosen if row in self.experts]
        alone = np.array([row for row in chosen if row not in self.experts], np.intp)
        methods = {self.methods[row] for row in chosen} - {""}
        head = {"method": "+".join(sorted(methods)) or None, "matrices": sum(map(self.measured, chosen))}
        found = {
            key: np.concatenate([values[alone], *(stack[:, at] for stack in stacks)])
            for at, (key, values) in enumerate(self.columns.items())
        }
        return head | _cells({key: _median(values) for key, values in found.items()}, whole=False)


def _cells(values: Mapping[str, float], *, whole: bool) -> dict[str, Any]:
    """Nest flat values by parameter; NaN becomes None."""
    row: dict[str, Any] = {}
    for figure in SPECTRAL_FIGURES:
        for parameter, key in spectral_keys(figure):
            value = values[key]
            cell: Any = None if math.isnan(value) else int(value) if figure.unit == "count" and whole else value
            if parameter is None:
                row[figure.key] = cell
            else:
                row.setdefault(figure.key, {})[parameter_key(parameter)] = cell
    return row


def _median(values: Floats) -> float:
    defined = values[~np.isnan(values)]
    return float(np.median(defined)) if defined.size else math.nan
