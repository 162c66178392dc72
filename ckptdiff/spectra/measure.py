"""One matrix of a pair: which computations its mode takes, in which passes, and the figures they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ckptdiff.linalg.angles import Angles, angle_rank, principal_angles
from ckptdiff.linalg.exact import SideSpectrum, effective_rank, nss, numerical_rank, side_spectrum
from ckptdiff.linalg.krylov import KrylovOptions, direct_values, krylov_values
from ckptdiff.linalg.passes import PanelSource, Stage, run_together
from ckptdiff.linalg.principal import Principal, principal, principal_rank
from ckptdiff.linalg.survey import Survey
from ckptdiff.metrics.catalogue import RHO, flat_key
from ckptdiff.metrics.rounding_null import change_chances
from ckptdiff.metrics.spectral import ENERGY_RANKS, RANK_TAU
from ckptdiff.options import SpectraOptions
from ckptdiff.spectra.matrices import MatrixView

__all__ = ["MatrixSpectra", "measure_exact", "measure_randomized"]

Floats = NDArray[np.float64]

_HEADLINE = 16
_RANDOMIZED_ERROR, _EXACT_ERROR = 4e-6, 1e-7
"""Standard error of a coverage that needs no further pass."""
_ANGLE_NOISE = 1e-6
"""Singular values below this share of the largest have no direction to speak of."""


@dataclass(frozen=True, slots=True)
class MatrixSpectra:
    """The figures of one matrix.

    Attributes
    ----------
    method : str
        "randomized", "exact", or "" if nothing could be measured.
    figures : dict of str to float
        By flat key; what is missing is undefined.
    values : dict of str to float64 array
        Singular values, largest first: "delta" and "base", in exact mode "tuned" too, and "angles_left" and
        "angles_right" in radians.
    reasons : tuple of str
        Why figures are missing.
    """

    method: str
    figures: dict[str, float] = field(default_factory=dict)
    values: dict[str, Floats] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()


def measure_randomized(
    source: PanelSource, known: Survey, view: MatrixView, on_grid: bool, options: SpectraOptions
) -> MatrixSpectra:
    """Measure a matrix: leading values of the update, and principal figures.

    Parameters
    ----------
    source : PanelSource
        Of float32 panels, or of float64 panels if float32 has too small a range.
    known : Survey
        Of this matrix.
    view : MatrixView
    on_grid : bool
        Whether both sides lie on the bfloat16 grid, so that the rounding null applies.
    options : SpectraOptions
    """
    short = source.short
    if short <= options.block * options.steps * 2:
        leading = direct_values(short, ENERGY_RANKS, with_vectors=False)
    else:
        krylov = KrylovOptions(options.block, options.steps, seed=options.seed)
        leading = krylov_values(short, ENERGY_RANKS, source.dtype, krylov)
    stage = principal(source, known, RHO, _chances(known, on_grid), error=_RANDOMIZED_ERROR)
    found, (base, subspaces) = run_together(source, leading, stage)
    figures, reasons = _principal_figures(subspaces, view.wide)
    figures |= _energies(found.lower, found.upper, known.delta_norm**2)
    values = {"delta": np.sqrt(found.lower), "base": np.sqrt(np.maximum(base[: ENERGY_RANKS[-1]], 0.0))}
    return MatrixSpectra("randomized", figures, values, reasons)


def measure_exact(source: PanelSource, known: Survey, view: MatrixView, on_grid: bool, together: bool) -> MatrixSpectra:
    """Measure a matrix in float64: everything, with all singular values.

    Parameters
    ----------
    source : PanelSource
        Of float64 panels.
    known, view, on_grid
        As in :func:`measure_randomized`.
    together : bool
        Whether memory allows three Gram matrices at a time, which saves passes.
    """
    delta, base, tuned = _sides(source, together)
    principal_stage = principal(
        source, known, RHO, _chances(known, on_grid), error=_EXACT_ERROR, eigenpairs=base.eigenpairs
    )
    (_, subspaces), angles = run_together(source, principal_stage, _angles(source.short, base, tuned))
    figures, reasons = _principal_figures(subspaces, view.wide)
    squares = delta.values**2
    figures |= _energies(squares, {k: float(squares[:k].sum()) for k in ENERGY_RANKS}, float(squares.sum()))
    figures |= {"effective_rank": effective_rank(delta.values), "nss": nss(base.values, tuned.values)}
    for tau in RANK_TAU:
        fewest, most = numerical_rank(delta.values, tau)
        figures[flat_key("numerical_rank", tau)] = fewest
        figures[flat_key("numerical_rank_high", tau)] = most
        figures[flat_key("numerical_rank_frac", tau)] = fewest / source.short
    values = {"delta": delta.values, "base": base.values, "tuned": tuned.values}
    if angles is None:
        return MatrixSpectra("exact", figures, values, (*reasons, "no principal angles: no subspaces to compare"))
    left, right = (angles.short, angles.long) if view.wide else (angles.long, angles.short)
    for name, found in (("left", left), ("right", right)):
        values[f"angles_{name}"] = found
        figures |= {f"angle_{name}": float(found[-1]), f"angle_{name}_mean": float(found.mean())}
    return MatrixSpectra("exact", figures, values, reasons)


def _chances(known: Survey, on_grid: bool) -> Floats | None:
    return change_chances(known.weights, known.changed) if on_grid else None


def _sides(source: PanelSource, together: bool) -> list[SideSpectrum]:
    short = source.short
    vectors = min(max(principal_rank(RHO[-1], short), angle_rank(short)) + 1, short)
    stages = [
        side_spectrum("delta", short),
        side_spectrum("base", short, vectors),
        side_spectrum("tuned", short, min(angle_rank(short) + 1, short)),
    ]
    if together:
        return run_together(source, *stages)
    return [run_together(source, stage)[0] for stage in stages]


def _angles(short: int, base: SideSpectrum, tuned: SideSpectrum) -> Stage[Angles | None]:
    count = angle_rank(short)
    defined = count > 0 and all(
        side.values[0] > 0 and side.values[count - 1] > _ANGLE_NOISE * side.values[0] for side in (base, tuned)
    )
    if not defined:
        return None
    assert base.eigenpairs is not None
    assert tuned.eigenpairs is not None
    return (yield from principal_angles(base.eigenpairs[1][:, :count], tuned.eigenpairs[1][:, :count]))


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
