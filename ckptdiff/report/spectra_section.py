"""The spectral part of the table report: concentration of the update, and where it lies in its base."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ckptdiff.errors import plural
from ckptdiff.figures.catalogue import parameter_key
from ckptdiff.figures.result import Diff
from ckptdiff.figures.spectral import ENERGY_RANKS
from ckptdiff.report.rows import SPECTRAL, View, labels, rows
from ckptdiff.report.screen import Column, Screen, legend_lines, table_lines
from ckptdiff.report.summary import listed
from ckptdiff.report.text import number, percent

_RHO = parameter_key(0.1)
_TAU = parameter_key(1e-5)
_LEVELS = " ▁▂▃▄▅▆▇█"
_MEANINGS = {
    "spectra": "spectra of d: unweighted medians over matrices.",
    "top 16": "top 16: part of its energy in 16 singular values.",
    "more": "more: by how much that is too low at most.",
    "stable rank": "stable rank: norm(d)^2 / s_1^2.",
    "decay": "decay: singular values at 1, 2, 4, ... 64.",
    "rank 1e-5": "rank 1e-5: part of the singular values above 1e-5 of the largest.",
    "NSS": "NSS: norm of the shift of W0's singular values / their norm.",
    "angle": "angle: the largest between the top right singular subspaces of W0 and W1, in radians.",
    "princ. energy": "princ. energy: part of the energy in the top 10 % singular directions of W0, left and right at "
    "once (1 % by chance in a square matrix).",
    "princ. 10 %": "princ. 10 %: part of the changes on the 10 % largest weights of W0 cut to these directions.",
    "not low": "not low: those of them not on the smallest 10 %.",
}


def spectra_section(diff: Diff, view: View, screen: Screen) -> list[str]:
    """The table of spectra, with what could not be measured; nothing if no spectra were."""
    if diff.spectra is None:
        return []
    members = [row for row in rows(diff, view) if row[SPECTRAL] and row[SPECTRAL]["method"]]
    left_out = left_out_matrices(diff)
    if not members:
        return ["", "no spectra: no matrix with an update", *left_out]
    columns = [Column("spectra", labels(members, view.rows_by), left=True), *_columns(members, screen)]
    legend = legend_lines(_MEANINGS, [columns], screen)
    return ["", *table_lines(columns, screen), *legend, *(screen.paint(line, "yellow") for line in left_out)]


def _columns(members: list[dict[str, Any]], screen: Screen) -> list[Column]:
    found = [row[SPECTRAL] for row in members]

    def cells(key: str, parameter: str | None = None) -> list[Any]:
        return [row[key] if parameter is None else row[key][parameter] for row in found]

    def shares(title: str, values: list[Any], rank: int = 0) -> Column:
        known = any(value is not None for value in values)
        return Column(title, [percent(value) if known else "" for value in values], rank=rank)

    exact = any(value is not None for value in cells("numerical_rank", _TAU))
    return [
        Column("matrices", [number(value) for value in cells("matrices")], rank=6),
        shares("top 16", cells("topk_energy", "16")),
        shares("more", [value if value and value > 1e-9 else None for value in cells("error_bound")], 5),
        Column("stable rank", [number(value) for value in cells("stable_rank")]),
        Column("decay", [sparkline(row["topk_energy"], screen) for row in found], left=True, style="cyan", rank=2),
        shares("rank 1e-5", cells("numerical_rank_frac", _TAU), 1),
        Column("NSS", [number(value) if exact else "" for value in cells("nss")], rank=3),
        Column("angle", [number(value) if exact else "" for value in cells("angle_right")], rank=6),
        shares("princ. energy", cells("principal_energy", _RHO)),
        shares("left", cells("principal_energy_left", _RHO), 7),
        shares("right", cells("principal_energy_right", _RHO), 7),
        shares("princ. 10 %", cells("principal_coverage", _RHO)),
        shares("rounding", cells("principal_coverage_null", _RHO)),
        shares("not low", cells("principal_not_low", _RHO), 4),
        shares("low 10 %", [row["low_coverage"][_RHO] for row in members], 5),
        shares("rounding", [row["low_coverage_null"][_RHO] for row in members], 5),
    ]


def sparkline(energies: Mapping[str, float | None], screen: Screen) -> str:
    """Singular values at 1, 2, 4, ... 64 in units of the first, from the energies up to there.

    Each but the first is the root mean square of those since the last power of two.
    """
    if not screen.blocks:
        return ""
    shares = [energies[parameter_key(k)] for k in ENERGY_RANKS]
    squares = [shares[0]]
    for (few, below), (more, above) in pairwise(zip(ENERGY_RANKS, shares, strict=True)):
        squares.append(None if above is None or below is None else max(above - below, 0.0) / (more - few))
    if not squares[0]:
        return ""
    heights = [0.0 if value is None else (value / squares[0]) ** 0.5 for value in squares]
    return "".join(_LEVELS[min(8, max(1, round(height * 8)))] if height else " " for height in heights)


def left_out_matrices(diff: Diff) -> list[str]:
    """Why matrices have no spectra, or not all of them."""
    assert diff.spectra is not None
    reasons: dict[str, list[str]] = {}
    for tensor, reason in zip(diff.tensors, diff.spectra.reasons, strict=True):
        if reason:
            reasons.setdefault(reason, []).append(tensor.name)
    return [f"{plural(len(names), 'tensor')}: {reason}: {listed(names)}" for reason, names in reasons.items()]
