"""Measure one matrix of a pair: choose the computations and passes of its mode, and make figures of what they give."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.figures.catalogue import flat_key
from ckptdiff.figures.spectral import ENERGY_RANKS, RANK_TAU
from ckptdiff.linalg.angles import Angles, angle_rank, angles_work, principal_angles
from ckptdiff.linalg.exact import (
    SideSpectrum,
    effective_rank,
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
from ckptdiff.linalg.principal import Principal, principal, principal_of_each, principal_work
from ckptdiff.linalg.stages import PanelSource, Side, Stage, run_together
from ckptdiff.linalg.survey import SURVEY_WORK, Survey
from ckptdiff.linalg.symmetric import first_of_each
from ckptdiff.measure.rounding_null import change_chances
from ckptdiff.measure.thresholds import RHO, principal_rank
from ckptdiff.options import SpectraMode, SpectraOptions
from ckptdiff.spectra.matrices import MatrixView

Floats = NDArray[np.float64]

_HEADLINE = 16
_RANDOMIZED_ERROR, _EXACT_ERROR = 4e-6, 1e-7
"""Standard error of a coverage that needs no further pass."""
_ANGLE_NOISE = 1e-6
"""Singular values below this share of the largest have no direction to speak of."""


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
    short, krylov, library = source.short, _krylov(source.short, options), source.library
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
    figures, reasons = _principal_figures(subspaces, wide)
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
    return surveyed + found, 1 + max(passes, krylov_passes(krylov))


def _krylov(short: int, options: SpectraOptions) -> KrylovOptions | None:
    """How the update's leading values are found: in a Krylov space, or directly where that is quicker."""
    if short <= options.block * options.steps * 2:
        return None
    return KrylovOptions(options.block, options.steps, seed=options.seed)


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
    return _exact((delta.values, base.values, tuned.values), subspaces, angles, view.wide)


def _exact(
    spectra: tuple[Floats, Floats, Floats], subspaces: Sequence[Principal], angles: Angles | None, wide: bool
) -> MatrixSpectra:
    """Of all singular values of the update, the base and the tuned side."""
    delta, base, tuned = spectra
    figures, reasons = _principal_figures(subspaces, wide)
    squares = delta**2
    figures |= _energies(squares, {k: float(squares[:k].sum()) for k in ENERGY_RANKS}, float(squares.sum()))
    figures |= {"effective_rank": effective_rank(delta), "nss": nss(base, tuned)}
    for tau in RANK_TAU:
        fewest, most = numerical_rank(delta, tau)
        figures[flat_key("numerical_rank", tau)] = fewest
        figures[flat_key("numerical_rank_high", tau)] = most
        figures[flat_key("numerical_rank_frac", tau)] = fewest / len(delta)
    values = {"delta": delta, "base": base, "tuned": tuned}
    if angles is None:
        return MatrixSpectra("exact", figures, values, (*reasons, "no principal angles: no subspaces to compare"))
    left, right = (angles.short, angles.long) if wide else (angles.long, angles.short)
    for name, found in (("left", left), ("right", right)):
        values[f"angles_{name}"] = found
        figures |= {f"angle_{name}": float(found[-1]), f"angle_{name}_mean": float(found.mean())}
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
    angles = angle_rank(short)
    vectors = min(max(principal_rank(RHO[-1], short), angles) + 1, short)
    return ("delta", 0), ("base", vectors), ("tuned", min(angles + 1, short))


def _angles(source: PanelSource, base: SideSpectrum, tuned: SideSpectrum) -> Stage[Angles | None]:
    count = angle_rank(source.short)
    if not _have_angles(count, base.values, tuned.values):
        return None
    assert base.eigenpairs is not None
    assert tuned.eigenpairs is not None
    ours, theirs = base.eigenpairs[1][:, :count], tuned.eigenpairs[1][:, :count]
    return (yield from principal_angles(ours, theirs, source.library))


def _have_angles(count: int, *sides: Floats) -> bool:
    """Whether so many leading singular vectors of each side have directions."""
    return count > 0 and all(values[0] > 0 and values[count - 1] > _ANGLE_NOISE * values[0] for values in sides)


def measure_stack(
    source: PanelSource, known: Sequence[Survey | None], wide: bool, off_grids: Sequence[float], mode: SpectraMode
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
            None if survey is None else _randomized(survey, found, one[0], one[1], wide)
            for survey, found, one in zip(known, values, subspaces, strict=True)
        ]
    sides = [
        run_together(source, values_of_each(side, short, vectors, library, stack, members))[0]
        for side, vectors in _wanted_sides(short)
    ]
    (delta, _), (base, base_pairs), (tuned, tuned_pairs) = sides
    count = angle_rank(short)
    compared = [_have_angles(count, *pair) for pair in zip(base, tuned, strict=True)]
    stages: list[Stage[Any]] = [
        principal_of_each(source, known, RHO, chances, error=_EXACT_ERROR, eigenpairs=base_pairs)
    ]
    if any(compared):
        counts = np.where(compared, count, 0)
        ours, theirs = (
            first_of_each(pairs[1][..., :count], counts, source.dtype, library) for pairs in (base_pairs, tuned_pairs)
        )
        stages.append(principal_angles(ours[0], theirs[0], library, ours[1]))
    subspaces, *angles = run_together(source, *stages)
    return [
        None
        if survey is None
        else _exact(
            (delta[member], base[member], tuned[member]),
            subspaces[member][1],
            Angles(angles[0].long[member], angles[0].short[member]) if compared[member] else None,
            wide,
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


def _principal_figures(found: Sequence[Principal], wide: bool) -> tuple[dict[str, float], tuple[str, ...]]:
    figures: dict[str, float] = {}
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
        }
        figures |= {flat_key(key, figure.rho): value for key, value in cells.items()}
        if figure.reason:
            reasons.append(f"no principal figures at rho {figure.rho:g}: {figure.reason}")
    return figures, tuple(reasons)
