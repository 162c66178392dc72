"""Tables of tensors: the largest movers, all of them, and those of two runs beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ckptdiff.errors import plural
from ckptdiff.figures.catalogue import parameter_key
from ckptdiff.figures.result import Diff
from ckptdiff.page.markup import Html, left_out, section, table, tag
from ckptdiff.page.sections import heading
from ckptdiff.page.shown_run import ShownRun
from ckptdiff.report.rows import View, rows
from ckptdiff.report.text import number, percent, quantity, shape_text

_EPS, _RHO = parameter_key(1e-5), parameter_key(0.1)
_MOVERS = 10
MEANINGS = (
    "noise: unchanged, if the update were noise of its norm, rounded. update: norm of d / norm of W0. share: part of "
    "the sum of d² of all tensors. low 10 %: part of the changes that is on the 10 % smallest weights; rounding: the "
    "same if the update were noise of this size, rounded."
)
"""Of the titles of a table of tensors."""

Figures = Mapping[str, Any]


def movers_section(runs: Sequence[ShownRun]) -> Html:
    """The tensors with most of the update."""
    parts = []
    for run in runs:
        moved = int(np.count_nonzero(run.diff.columns["delta_norm"] > 0))
        parts += heading(run)
        if not moved:
            parts.append(left_out("no tensor has an update."))
            continue
        found = rows(run.diff, View("tensor", "delta_energy_share", min(_MOVERS, moved)))
        held = percent(sum(row["delta_energy_share"] or 0.0 for row in found))
        parts += [
            tag("p", f"{plural(len(found), 'tensor')} of {moved:,} that moved hold {held} of the sum of d²."),
            tensor_table(found, run.diff),
        ]
    return section("movers", "Movers", *parts)


def tensor_table(found: Sequence[Figures], diff: Diff, name: str | None = None) -> Html:
    """A table of tensors, or of groups of them."""
    single = not found or "name" in found[0]
    spectra = diff.spectra is not None
    titles = ["tensor", "shape", "stored"] if single else ["module type", "layer", "tensors"]
    titles += ["values", "unchanged", "noise", "|d| ≤ 1e-5", "update", "share", "low 10 %", "rounding", "max |d|"]
    titles += ["top 16", "stable rank"] if spectra else []
    return table(
        titles, (_cells(row, single=single, spectra=spectra) for row in found), left=3 if single else 1, name=name
    )


def _cells(row: Figures, *, single: bool, spectra: bool) -> list[object]:
    if single:
        base, tuned = row["dtype_base"], row["dtype_tuned"]
        head = [row["name"], shape_text(tuple(row["shape"])), base if base == tuned else f"{base} → {tuned}"]
    else:
        head = [row["label"], row["layers"], f"{row['tensors']:,}"]
    cells = [
        *head,
        quantity(row["numel"]),
        percent(row["unchanged_bitwise"]),
        percent(row["unchanged_null"]),
        percent(row["unchanged_abs"][_EPS]),
        percent(row["rel_norm"]),
        percent(row["delta_energy_share"]),
        percent(row["low_coverage"][_RHO]),
        percent(row["low_coverage_null"][_RHO]),
        number(row["max_abs"]),
    ]
    if spectra:
        found = row["spectral"]
        cells += [percent(found["topk_energy"]["16"]), number(found["stable_rank"])] if found else ["", ""]
    return cells


def pair_table(found: Sequence[Sequence[Figures]], name: str) -> Html:
    """A table of the same tensors, or groups of them, of two runs beside each other."""
    by_name = [{row["name"] if "name" in row else (row["label"], row["layers"]): row for row in some} for some in found]
    single = any("name" in row for some in found for row in some)
    titles = ["tensor"] if single else ["module type", "layer"]
    kinds: tuple[tuple[str, Callable[[Figures], float | None]], ...] = (
        ("unchanged", lambda row: row["unchanged_bitwise"]),
        ("noise", lambda row: row["unchanged_null"]),
        ("|d| ≤ 1e-5", lambda row: row["unchanged_abs"][_EPS]),
        ("update", lambda row: row["rel_norm"]),
        ("share", lambda row: row["delta_energy_share"]),
        ("low 10 %", lambda row: row["low_coverage"][_RHO]),
        ("rounding", lambda row: row["low_coverage_null"][_RHO]),
    )
    titles += [f"{title}, {side}" for title, _ in kinds for side in "AB"]
    lines = []
    for key in dict.fromkeys(key for some in by_name for key in some):
        both = [some.get(key) for some in by_name]
        cells = [percent(of(row)) if row is not None else "" for _, of in kinds for row in both]
        lines.append([*([key] if single else key), *cells])
    return table(titles, lines, left=1, name=name)
