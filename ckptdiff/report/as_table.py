"""The table report: the newcomer's lines, then tables by block, module type and layer, and the largest movers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TextIO

import numpy as np

from ckptdiff.figures.catalogue import parameter_key
from ckptdiff.figures.members import GroupBy
from ckptdiff.figures.result import Diff
from ckptdiff.report.rows import View, labels, rows
from ckptdiff.report.screen import Column, Screen, bar, legend_lines, screen_of, table_lines
from ckptdiff.report.spectra_section import spectra_section
from ckptdiff.report.summary import summary
from ckptdiff.report.text import number, percent, quantity, shape_text

_EPS = parameter_key(1e-5)
_RHO = parameter_key(0.1)
_TAU = parameter_key(1e-3)
_BAR = 10
_MOVERS = 5
"""Tensors listed in the overview when ``--top`` does not say how many."""
_TITLES: Mapping[GroupBy, str] = {
    "tensor": "tensor",
    "module": "module type",
    "layer": "layer",
    "layer,module": "layer, module type",
    "block": "block",
    "tower": "tower",
    "group": "group",
}
_MEANINGS = {
    "noise": "noise: unchanged, if the update were noise of its norm, rounded.",
    "update": "update: norm of d / norm of W0.",
    "share": "share: part of the sum of d^2 of all tensors.",
    "low 10 %": "low 10 %: part of the changes that is on the 10 % smallest weights.",
    "rounding": "rounding: the same if the update were noise of this size, rounded.",
    "|d|<=1e-3 rms": "rms: that of W0.",
}


def write(diff: Diff, stream: TextIO, view: View) -> None:
    """Write the table as wide and as colourful as the stream can show it."""
    stream.write("\n".join(table(diff, view, screen_of(stream))) + "\n")


def table(diff: Diff, view: View, screen: Screen) -> list[str]:
    """The lines of the report.

    Without `view.by`: block, module type and layer tables, towers and the user's groups where there are any, and the
    tensors with the largest share of the update. With it: that one table.
    """
    headline, *lines = (_highlight(line, screen) for line in summary(diff, view.run_file, overview=view.by is None))
    lines = [screen.paint(headline, "bold"), *lines]
    if view.by is not None:
        tables = [_section(diff, view, screen)]
    else:
        tables = [_section(diff, View(by), screen) for by in _overview(diff)]
        movers = min(view.top or _MOVERS, int(np.count_nonzero(diff.columns["delta_norm"])))
        if movers:
            largest = View("tensor", view.sort or "delta_energy_share", movers)
            tables.append(_section(diff, largest, screen, f"top {movers} movers"))
    for columns in filter(None, tables):
        lines += ["", *table_lines(columns, screen)]
    if view.by is not None and not tables[0]:
        defined = "; --group NAME=REGEX of ckptdiff diff makes them" if view.by == "group" else ""
        lines += ["", f"no {_TITLES[view.by]} to show{defined}"]
    lines += legend_lines(_MEANINGS, [columns for columns in tables if columns], screen)
    return [*lines, *spectra_section(diff, view if view.by is not None else View("module"), screen)]


def _overview(diff: Diff) -> Iterator[GroupBy]:
    if len({facts.tower for facts in diff.tensors}) > 1:
        yield "tower"
    yield from ("block", "module", "layer")
    if any(facts.groups for facts in diff.tensors):
        yield "group"


def _highlight(line: str, screen: Screen) -> str:
    if line.startswith(("warning:", "not compared:")):
        return screen.paint(line, "yellow")
    return line


def _section(diff: Diff, view: View, screen: Screen, title: str | None = None) -> list[Column]:
    """The columns of one table; none if it has no rows."""
    members = rows(diff, view)
    if not members:
        return []
    columns = _columns(members, view.rows_by, screen)
    columns[0] = replace(columns[0], title=title or _TITLES[view.rows_by])
    return columns


def _columns(members: Sequence[Mapping[str, Any]], by: GroupBy, screen: Screen) -> list[Column]:
    def cells(spell: Callable[[Any], str], key: str, parameter: str | None = None) -> list[str]:
        return [spell(row[key] if parameter is None else row[key][parameter]) for row in members]

    single = by == "tensor"
    relative = [row["rel_norm"] for row in members]
    largest = max((value for value in relative if value is not None), default=0.0)
    columns = [Column("", labels(members, by), left=True)]
    if single:
        columns += [
            Column("shape", [shape_text(tuple(row["shape"])) for row in members], rank=4),
            Column("stored", [_stored(row) for row in members], left=True, rank=6),
        ]
    else:
        columns.append(Column("tensors", cells(number, "tensors"), rank=4))
    return [
        *columns,
        Column("values", cells(quantity, "numel"), rank=3),
        Column("unchanged", cells(percent, "unchanged_bitwise")),
        Column("noise", _unless_empty(cells(percent, "unchanged_null"))),
        Column("as stored", _unless_empty(cells(percent, "unchanged_stored")), rank=5),
        Column("|d|<=1e-5", cells(percent, "unchanged_abs", _EPS), rank=1 if single else 0),
        Column("|d|<=1e-3 rms", cells(percent, "unchanged_rel", _TAU), rank=8),
        Column("update", cells(percent, "rel_norm")),
        Column("", [bar(_of(value, largest), _BAR, screen) for value in relative], left=True, style="cyan", rank=2),
        Column("share", cells(percent, "delta_energy_share")),
        Column("low 10 %", cells(percent, "low_coverage", _RHO), rank=5),
        Column("rounding", _unless_empty(cells(percent, "low_coverage_null", _RHO)), rank=5),
        Column("max |d|", cells(number, "max_abs"), rank=7),
        Column("in mask", _unless_empty([percent(_of(row["changed"], row["numel"])) for row in members]), rank=7),
    ]


def _of(part: float | None, whole: float) -> float | None:
    return None if part is None or not whole else part / whole


def _unless_empty(cells: list[str]) -> list[str]:
    """The cells, or nothing at all where every figure is undefined."""
    return cells if any(cell != percent(None) for cell in cells) else [""] * len(cells)


def _stored(row: Mapping[str, Any]) -> str:
    base, tuned = row["dtype_base"], row["dtype_tuned"]
    return str(base) if base == tuned else f"{base} -> {tuned}"
