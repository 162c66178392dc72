"""Measure one matrix of a pair: choose the computations and passes of its mode, and make figures of what they give."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.figures.catalogue import flat_key
from ckptdiff.figures.spectral import ENERGY_RANKS, RANK_TAU, TOP_P
from ckptdiff.linalg.angles import Angles, Comparable, angles_work, compared_rank, principal_angles
from ckptdiff.linalg.exact import (
    SideSpectrum,
    effective_rank,
    hard_threshold,
    nss,
    numerical_rank,
    side_spectrum,
    side_work,
    values_of_each,
)
from ckptdiff.linalg.krylov import (
    KrylovOptions,
    LeadingValues,
    direct_values,
    direct_values_of_each,
    direct_work,
    krylov_passes,
    krylov_values,
    krylov_work,
)
from ckptdiff.linalg.nonzeros import Nonzeros
from ckptdiff.linalg.principal import Principal, principal, principal_of_each, principal_work
from ckptdiff.linalg.stages import PanelSource, Side, Stage, run_together
from ckptdiff.linalg.survey import SURVEY_WORK, Survey
from ckptdiff.linalg.symmetric import first_of_each
from ckptdiff.measure.rounding_null import change_chances
from ckptdiff.measure.thresholds import RHO, exactly
from ckptdiff.options import SpectraMode, SpectraOptions
from ckptdiff.spectra.matrices import MatrixView

Floats = NDArray[np.float64]

_HEADLINE = 16
_RANDOMIZED_ERROR, _EXACT_ERROR = 4e-6, 1e-7
"""Standard error of a coverage that needs no further pass."""
_SPARSE, _DENSE_GRAM = 5, 2048
"""Where more than one of so many weights moved, zeros are not skipped, and the Gram matrix of an update of more columns
than this costs more than the products it saves."""


@dataclass(frozen=True, slots=True)
class MatrixSpectra:
    """The figures of one matrix."""

    method: str
    """Of "randomized" and "exact"; "" if nothing could be measured."""
    figures: dict[str, float] = field(default_factory=dict)
    """By flat key; what is missing is undefined."""
    values: dict[str, Floats] = field(default_factory=dict)
    """Singular values, largest first: "delta" and "base", in exact mode "tuned" too, and "angles_left" and
    "angles_right" in radians."""
    reasons: tuple[str, ...] = ()
    """Why figures are missing."""


def measure_randomized(
    source: PanelSource, known: Survey, view: MatrixView, off_grid: float, options: SpectraOptions
) -> MatrixSpectra:
    """Measure a matrix: leading values of the update, and principal figures.

    Panels are float32, or float64 if float32 has too small a range. A part of the base may lie off the grid of
    bfloat16, which the rounding null takes; NaN makes none.
    """
    dense = known.support * _SPARSE >= known.numel
    short, krylov, library = source.short, _krylov(source.short, options, dense), source.library
    if krylov is not None and not dense and short <= krylov.gram:
        itemsize = source.dtype.itemsize
        krylov = replace(krylov, sparse=Nonzeros.needs(known.support, itemsize) <= itemsize * short**2)
    if krylov is None:
        leading = direct_values(short, ENERGY_RANKS, with_vectors=False, library=library)
    else:
        leading = krylov_values(short, ENERGY_RANKS, source.dtype, krylov, library)
    stage = principal(source, known, RHO, _chances(known, off_grid), error=_RANDOMIZED_ERROR)
    found, (base, subspaces) = run_together(source, leading, stage)
    return _randomized(known, found, base, subspaces, view.wide)


def _randomized(
    known: Survey, found: LeadingValues, base: Floats, subspaces: Sequence[Principal], wide: bool
) -> MatrixSpectra:
    figures, reasons = _principal_figures(known, subspaces, wide)
    figures |= _energies(found.lower, found.upper, known.delta_norm**2)
    values = {"delta": np.sqrt(found.lower), "base": np.sqrt(np.maximum(base[: ENERGY_RANKS[-1]], 0.0))}
    return MatrixSpectra("randomized", figures, values, reasons)


def randomized_work(
    view: MatrixView, options: SpectraOptions, itemsize: int, directly: bool = False
) -> tuple[float, int]:
    """Foresee what a survey and :func:`measure_randomized` count, and how many passes they make.

    Or what they count for a matrix of a stack, whose leading values are found `directly`.
    """
    long, short, krylov = view.long, view.short, None if directly else _krylov(view.short, options)
    surveyed = SURVEY_WORK * long * short
    found, passes = principal_work(long, short, itemsize, RHO, error=_RANDOMIZED_ERROR, decomposed=False)
    if krylov is None:
        return surveyed + found + direct_work(long, short, ENERGY_RANKS, with_vectors=False), 1 + passes
    found += krylov_work(long, short, itemsize, krylov)
    return surveyed + found, 1 + max(passes, krylov_passes(short, krylov))


def _krylov(short: int, options: SpectraOptions, dense: bool = False) -> KrylovOptions | None:
    """How the update's leading values are found: in a Krylov space, or directly where that is quicker."""
    if short <= options.block * options.steps * 2:
        return None
    found = KrylovOptions(options.block, options.steps, seed=options.seed)
    return replace(found, gram=_DENSE_GRAM) if dense else found


def measure_exact(
    source: PanelSource, known: Survey, view: MatrixView, off_grid: float, together: bool
) -> MatrixSpectra:
    """Measure a matrix in float64 panels: everything, with all singular values.

    If memory allows three Gram matrices, all are made `together`, which saves passes.
    """
    delta, base, tuned = _sides(source, together)
    principal_stage = principal(
        source, known, RHO, _chances(known, off_grid), error=_EXACT_ERROR, eigenpairs=base.eigenpairs
    )
    (_, subspaces), angles = run_together(source, principal_stage, _angles(source, base, tuned))
    return _exact(known, (delta.values, base.values, tuned.values), subspaces, angles, view)


def _exact(
    known: Survey,
    spectra: tuple[Floats, Floats, Floats],
    subspaces: Sequence[Principal],
    angles: Angles | None,
    view: MatrixView,
) -> MatrixSpectra:
    """Of all singular values of the update, the base and the tuned side."""
    delta, base, tuned = spectra
    figures, reasons = _principal_figures(known, subspaces, view.wide)
    squares = delta**2
    figures |= _energies(squares, {k: float(squares[:k].sum()) for k in ENERGY_RANKS}, float(squares.sum()))
    figures |= _all_values(delta, view.long) | _drift(base, tuned, known)
    for tau in RANK_TAU:
        fewest, most = numerical_rank(delta, tau)
        figures[flat_key("numerical_rank", tau)] = fewest
        figures[flat_key("numerical_rank_high", tau)] = most
        figures[flat_key("numerical_rank_frac", tau)] = fewest / view.short
    values = {"delta": delta, "base": base, "tuned": tuned}
    sides = ("right", "left") if view.wide else ("left", "right")
    if angles is None or not angles.long.size:
        reasons = (*reasons, "no principal angles: no subspaces to compare")
    else:
        for name, found in zip(sides, (angles.long, angles.short), strict=True):
            values[f"angles_{name}"] = found
            figures |= {f"angle_{name}": float(found[-1]), f"angle_{name}_mean": float(found.mean())}
    for subspace in subspaces:
        turned = None if angles is None else angles.rotations.get(subspace.rank)
        if turned is not None:
            keys = (flat_key(f"top_subspace_rotation_{name}", subspace.rho) for name in sides)
            figures |= dict(zip(keys, map(float, turned), strict=True))
        elif not subspace.reason:
            reasons = (*reasons, f"no rotation at rho {subspace.rho:g}: no gap in the tuned side's spectrum, or noise")
    return MatrixSpectra("exact", figures, values, reasons)


def exact_work(view: MatrixView, together: bool) -> tuple[float, int]:
    """Foresee what a survey and :func:`measure_exact` count, and how many passes they make."""
    long, short = view.long, view.short
    found, passes = principal_work(long, short, 8, RHO, error=_EXACT_ERROR, decomposed=True)
    found += SURVEY_WORK * long * short + angles_work(long, short)
    found += sum(side_work(long, short, vectors) for _, vectors in _wanted_sides(short))
    return found, 1 + (1 if together else 3) + max(passes, 2)


def _chances(known: Survey, off_grid: float) -> Floats | None:
    return None if math.isnan(off_grid) else change_chances(known.weights, known.changed, off_grid)


def _sides(source: PanelSource, together: bool) -> list[SideSpectrum]:
    short, library = source.short, source.library
    stages = [side_spectrum(side, short, vectors, library) for side, vectors in _wanted_sides(short)]
    if together:
        return run_together(source, *stages)
    return [run_together(source, stage)[0] for stage in stages]


def _wanted_sides(short: int) -> Sequence[tuple[Side, int]]:
    """The sides, and how many leading vectors of each."""
    vectors = min(compared_rank(short) + 1, short)
    return ("delta", 0), ("base", vectors), ("tuned", vectors)


def _angles(source: PanelSource, base: SideSpectrum, tuned: SideSpectrum) -> Stage[Angles | None]:
    """Angles and rotations between the leading subspaces of both sides, as far as these are defined."""
    defined = Comparable.of(base.values, tuned.values)
    if not defined.count:
        return None
    assert base.eigenpairs is not None
    assert tuned.eigenpairs is not None
    ours, theirs = base.eigenpairs[1][:, : defined.count], tuned.eigenpairs[1][:, : defined.count]
    return (yield from principal_angles(ours, theirs, source.library, ranks=defined.ranks, angles=defined.angles))


def _all_values(values: Floats, long: int) -> dict[str, float]:
    """Figures of all singular values of an update, largest first."""
    shares = np.cumsum(values**2) / np.sum(values**2)
    figures = {"effective_rank": effective_rank(values)}
    for p in TOP_P:
        figures[flat_key("topp_energy", p)] = float(shares[math.ceil(exactly(p) / 100 * values.size) - 1])
    threshold = hard_threshold(values, long)
    if not math.isnan(threshold):
        rank = int(np.count_nonzero(values > threshold))
        figures |= {"dg_rank": rank, "dg_energy": float(shares[rank - 1]) if rank else 0.0}
    return figures


def _drift(base: Floats, tuned: Floats, known: Survey) -> dict[str, float]:
    """How far the base's singular values moved, by their norm and by that of the update."""
    moved = nss(base, tuned)
    return {"nss": moved, "spectral_drift": moved * known.base_norm / known.delta_norm}


def measure_stack(
    source: PanelSource, known: Sequence[Survey | None], view: MatrixView, off_grids: Sequence[float], mode: SpectraMode
) -> list[MatrixSpectra | None]:
    """Measure the pairs of a stack, each as by itself; its update's leading values are found directly in either mode.

    Surveys and parts off the grid are those of its first pairs; None leaves a pair out, which has to hold zeros.
    """
    library, short, stack, members = source.library, source.short, source.stack, len(known)
    chances = [
        None if survey is None else _chances(survey, part) for survey, part in zip(known, off_grids, strict=True)
    ]
    if mode == "randomized":
        leading = direct_values_of_each(short, ENERGY_RANKS, library, stack, members)
        stage = principal_of_each(source, known, RHO, chances, error=_RANDOMIZED_ERROR)
        values, subspaces = run_together(source, leading, stage)
        return [
            None if survey is None else _randomized(survey, found, one[0], one[1], view.wide)
            for survey, found, one in zip(known, values, subspaces, strict=True)
        ]
    sides = [
        run_together(source, values_of_each(side, short, vectors, library, stack, members))[0]
        for side, vectors in _wanted_sides(short)
    ]
    (delta, _), (base, base_pairs), (tuned, tuned_pairs) = sides
    defined = [Comparable.of(*pair) for pair in zip(base, tuned, strict=True)]
    stages: list[Stage[Any]] = [
        principal_of_each(source, known, RHO, chances, error=_EXACT_ERROR, eigenpairs=base_pairs)
    ]
    if any(one.count for one in defined):
        # As if all were defined in each pair: then no digit of one depends on the others.
        most, counts = Comparable.most(short), np.array([one.count for one in defined])
        (ours, missing), (theirs, _) = (
            first_of_each(pairs[1][..., : most.count], counts, source.dtype, library)
            for pairs in (base_pairs, tuned_pairs)
        )
        stages.append(principal_angles(ours, theirs, library, ranks=most.ranks, angles=most.angles, missing=missing))
    subspaces, *compared = run_together(source, *stages)
    return [
        None
        if survey is None
        else _exact(
            survey,
            (delta[member], base[member], tuned[member]),
            subspaces[member][1],
            defined[member].chosen(compared[0], member) if compared else None,
            view,
        )
        for member, survey in enumerate(known)
    ]


def _energies(squares: Floats, upper: Mapping[int, float], total: float) -> dict[str, float]:
    figures = {"stable_rank": total / float(squares[0])}
    for k in ENERGY_RANKS:
        share = min(float(squares[:k].sum()) / total, 1.0)
        bound = min(upper[min(k, max(upper))] / total, 1.0)
        figures[flat_key("topk_energy", k)] = share
        figures[flat_key("topk_energy_bound", k)] = max(bound - share, 0.0)
    figures["error_bound"] = figures[flat_key("topk_energy_bound", _HEADLINE)]
    return figures


def _principal_figures(
    known: Survey, found: Sequence[Principal], wide: bool
) -> tuple[dict[str, float], tuple[str, ...]]:
    figures = {flat_key("low_coverage_abs", rho): known.low_coverage_above(rho) for rho in RHO}
    reasons = []
    for figure in found:
        left, right = figure.energy_long, figure.energy_short
        if wide:
            left, right = right, left
        cells = {
            "principal_energy": figure.energy,
            "principal_energy_left": left,
            "principal_energy_right": right,
            "principal_gap": figure.gap,
            "principal_coverage": figure.coverage,
            "principal_coverage_null": figure.null,
            "principal_coverage_abs": figure.coverage_above,
            "principal_not_low": figure.not_low,
            "principal_not_low_abs": figure.not_low_above,
        }
        figures |= {flat_key(key, figure.rho): value for key, value in cells.items()}
        if figure.reason:
            reasons.append(f"no principal figures at rho {figure.rho:g}: {figure.reason}")
    return figures, tuple(reasons)
