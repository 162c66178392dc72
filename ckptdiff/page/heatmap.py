"""The heatmap: one figure of every module type in every layer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptdiff.errors import plural
from ckptdiff.figures.catalogue import parameter_key
from ckptdiff.page.markup import Html, tag
from ckptdiff.page.svg import DIVERGING, SEQUENTIAL, Picture, color, ink, picture, shortened, width_of, word
from ckptdiff.report.text import percent, safe

_RHO = parameter_key(0.1)
_MOST_COLUMNS = 96
"""Layers beyond that share columns."""
_LETTERS = 22
_HEIGHT, _GAP = 20, 8
_WIDTH = 720
_NARROW, _WIDE, _WRITTEN = 8.0, 52.0, 36.0
"""Widths of a cell: the least and the most, and that from which on it has its figure written in it."""
_LEGEND = 24
"""Colours of the legend."""
_CLEAR = 0.01
"""What is called above or below a null."""
_DEPTHS = 6
"""Layers from which on first and last ones are told apart."""

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CellFigure:
    """A figure that cells can show."""

    title: str
    meaning: str
    value: Callable[[Row], float | None]
    diverging: bool = False
    """Whether it has two signs, and 0 in its middle."""


def _low_excess(row: Row) -> float | None:
    found, null = row["low_coverage"][_RHO], row["low_coverage_null"][_RHO]
    return None if found is None or null is None else found - null


def _top_energy(row: Row) -> float | None:
    return row["spectral"]["topk_energy"]["16"] if row.get("spectral") else None


UPDATE_FIGURES = (
    CellFigure("unchanged", "part of the values with equal bits after the cast", lambda row: row["unchanged_bitwise"]),
    CellFigure("relative update", "norm of d / norm of W0", lambda row: row["rel_norm"]),
    CellFigure("share of the update", "part of the sum of d² of all tensors", lambda row: row["delta_energy_share"]),
    CellFigure(
        "low coverage minus null",
        "part of the changes that is on the 10 % smallest weights, less what rounded noise would give; in points",
        _low_excess,
        diverging=True,
    ),
    CellFigure("top-16 energy", "part of d² in 16 singular values; the median matrix of the cell", _top_energy),
)
"""What cells of a run show."""

Cell = tuple[str, int | None]
"""A row of the picture, and the first layer of a column; None stands for what is in no layer."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Where cells lie: rows of module types, columns of layers."""

    rows: tuple[str, ...]
    columns: tuple[int | None, ...]
    """First layer of each; None stands for what is in no layer."""
    together: int
    """Layers of a column."""
    towers: bool
    """Whether rows say which tower they are of."""

    @classmethod
    def of(cls, places: Sequence[Any]) -> Grid:
        """The grid of places, which have tower, module_type and layer, in order of first appearance."""
        together = -(-len({place.layer for place in places}) // _MOST_COLUMNS)
        grid = cls((), (), max(1, together), len({place.tower for place in places}) > 1)
        found = [grid.cell_of(place) for place in places]
        columns = {column for _, column in found}
        ordered = [*([None] if None in columns else []), *sorted(column for column in columns if column is not None)]
        return replace(grid, rows=tuple(dict.fromkeys(row for row, _ in found)), columns=tuple(ordered))

    def cell_of(self, place: Any) -> Cell:
        """Name of the row, and column, of a place."""
        row = f"{place.tower} {place.module_type}" if self.towers else place.module_type
        return row, None if place.layer is None else place.layer // self.together * self.together

    def cells(self, places: Sequence[Any], of_groups: Callable[[list[list[int]]], Sequence[Row]]) -> dict[Cell, Row]:
        """Figures of every cell, of the tensors at these places; None is the place of what is left out."""
        members: dict[Cell, list[int]] = {}
        for at, place in enumerate(places):
            if place is not None:
                members.setdefault(self.cell_of(place), []).append(at)
        return dict(zip(members, of_groups(list(members.values())), strict=True))

    def layer_name(self, column: int | None) -> str:
        """What a column stands for, in words."""
        if column is None:
            return "outside of the layers"
        last = column + self.together - 1
        return f"layer {column}" if self.together == 1 else f"layers {column} to {last}"


def heatmaps(
    grid: Grid, runs: Sequence[tuple[str, Mapping[Cell, Row]]], figures: Sequence[CellFigure], notes: Mapping[str, str]
) -> Html:
    """A heatmap of each figure, of one run or of several beside each other in the same colours.

    `runs` are names and cells; `notes` has a further sentence for the title of a figure.
    """
    drawn = []
    for figure in figures:
        values = [{cell: figure.value(row) for cell, row in cells.items()} for _, cells in runs]
        known = [value for found in values for value in found.values() if value is not None]
        if not known:
            continue
        low, high = _ends(known, figure)
        parts: list[Html] = []
        for (name, cells), found in zip(runs, values, strict=True):
            head = [tag("h4", name)] if len(runs) > 1 else []
            shown = tag("div", _picture(grid, figure, found, cells, low, high), class_="wide")
            parts.append(tag("div", *head, shown, tag("p", _sentence(grid, figure, found))))
        note = notes.get(figure.title)
        drawn.append(
            tag(
                "figure",
                tag("h3", capital(figure.title)),
                tag("div", *parts, class_="beside"),
                *([tag("p", note)] if note else []),
                data_title=figure.title,
            )
        )
    return tag("div", *drawn, class_="switch")


def heatmap_picture(grid: Grid, cells: Mapping[Cell, Row], figure: CellFigure) -> Picture | None:
    """The heatmap of one figure, None where it is undefined everywhere."""
    values = {cell: figure.value(row) for cell, row in cells.items()}
    known = [value for value in values.values() if value is not None]
    if not known:
        return None
    svg = _picture(grid, figure, values, cells, *_ends(known, figure))
    return Picture(svg, capital(figure.title), _sentence(grid, figure, values))


def capital(words: str) -> str:
    """Words with a capital at their beginning."""
    return words[0].upper() + words[1:]


def _ends(known: Sequence[float], figure: CellFigure) -> tuple[float, float]:
    if figure.diverging:
        most = max(map(abs, known))
        return -most, most
    low, high = min(known), max(known)
    # What only rounding tells apart has one colour.
    return low, high if percent(high) != percent(low) else low


def _picture(
    grid: Grid,
    figure: CellFigure,
    values: Mapping[Cell, float | None],
    cells: Mapping[Cell, Row],
    low: float,
    high: float,
) -> Html:
    names = [shortened(row, _LETTERS) for row in grid.rows]
    left = max(map(width_of, names)) + 10
    width = min(max((_WIDTH - left) / len(grid.columns), _NARROW), _WIDE)
    # The word above the first column needs room beside the next number.
    gap = max(_GAP, 34 - width) if None in grid.columns and len(grid.columns) > 1 else 0
    top = 40
    bottom = top + _HEIGHT * len(grid.rows)

    def start(at: int) -> float:
        return left + at * width + (gap if at and gap else 0)

    marks: list[Html] = [word(2, 12, f"{figure.title}, {'points' if figure.diverging else '%'}, by layer")]
    every = max(1, math.ceil(26 / width))
    for at, column in enumerate(grid.columns):
        if column is None:
            marks.append(word(start(at) + width / 2, top - 6, "none", "middle"))
        elif (at - (gap > 0)) % every == 0:
            marks.append(word(start(at) + width / 2, top - 6, column, "middle"))
    for down, (row, name) in enumerate(zip(grid.rows, names, strict=True)):
        y = top + _HEIGHT * down
        marks.append(word(left - 6, y + 14, name, "end"))
        for at, column in enumerate(grid.columns):
            if (row, column) in values:
                value, members = values[row, column], cells[row, column]["tensors"]
                counted = "" if members == 1 else f" ({plural(members, 'tensor')})"
                hint = f"{safe(row)}, {grid.layer_name(column)}: {_spelled(value, figure)}{counted}"
                marks.append(_cell(start(at), y, width, value, low, high, figure, hint))
    right = start(len(grid.columns) - 1) + width
    marks += _legend(left, bottom + 14, figure, low, high)
    return picture(max(right + 2, left + 260), bottom + 48, f"heatmap of {figure.title}", *marks)


def _cell(
    x: float, y: float, width: float, value: float | None, low: float, high: float, figure: CellFigure, hint: str
) -> Html:
    if value is None:
        look: dict[str, Any] = {"fill": "none", "stroke": "currentColor", "stroke_opacity": 0.3}
        return tag("rect", tag("title", hint), x=x + 0.5, y=y + 0.5, width=width - 2, height=_HEIGHT - 2.0, **look)
    fill = color(DIVERGING if figure.diverging else SEQUENTIAL, (value - low) / ((high - low) or 1.0))
    # There are thousands of these: a path takes fewer characters than a rectangle.
    shape = f"M{x:.1f} {y}h{width - 1:.1f}v{_HEIGHT - 1}H{x:.1f}z"
    mark = tag("path", tag("title", hint), d=shape, fill=fill)
    if width < _WRITTEN:
        return mark
    written = word(x + (width - 1) / 2, y + 14, _short(value), "middle", fill=ink(fill), pointer_events="none")
    return Html(mark + written)


def _short(value: float) -> str:
    """A share in percent, with one digit behind the point, or two digits of what is small."""
    shown = 100 * value
    return f"{shown:.0f}" if shown in (0.0, 100.0) else f"{shown:.1f}" if abs(shown) >= 1 else f"{shown:.2g}"


def _spelled(value: float | None, figure: CellFigure) -> str:
    if value is None or not figure.diverging:
        return percent(value)
    return f"{100 * value:+.2g} points"


def _legend(x: float, y: float, figure: CellFigure, low: float, high: float) -> list[Html]:
    scale = DIVERGING if figure.diverging else SEQUENTIAL
    step = 200 / _LEGEND
    marks = [
        tag(
            "rect",
            x=x + at * step,
            y=y,
            width=step + 0.3,
            height=10,
            fill=color(scale, (at + 0.5) / _LEGEND),
            shape_rendering="crispEdges",
        )
        for at in range(_LEGEND)
    ]
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        value = low + share * (high - low)
        sign = "+" if figure.diverging and value > 0 else ""
        marks.append(word(x + 200 * share, y + 24, sign + _short(value), anchor))
    marks.append(word(x + 208, y + 9, "points" if figure.diverging else "%"))
    return marks


def _sentence(grid: Grid, figure: CellFigure, values: Mapping[Cell, float | None]) -> str:
    """What the picture shows: where the figure is largest and smallest, and how it goes with depth."""
    known = {cell: value for cell, value in values.items() if value is not None}
    said = f"{capital(figure.title)}: {figure.meaning}. "
    if not known:
        return f"{said}It is undefined everywhere."
    most, least = max(known, key=lambda cell: known[cell]), min(known, key=lambda cell: known[cell])
    if _spelled(known[most], figure) == _spelled(known[least], figure):
        return f"{said}It is {_spelled(known[most], figure)} in every cell."
    said += (
        f"Largest in {_place(grid, most)} ({_spelled(known[most], figure)}), "
        f"smallest in {_place(grid, least)} ({_spelled(known[least], figure)})"
    )
    if figure.diverging:
        above = sum(value > _CLEAR for value in known.values())
        below = sum(value < -_CLEAR for value in known.values())
        said += f"; of {plural(len(known), 'cell')} {above} lie more than a point above their null, {below} below"
    layers = sorted({column for _, column in known if column is not None})
    if len(layers) >= _DEPTHS:
        third = len(layers) // 3
        ends = [
            statistics.median(value for (_, column), value in known.items() if column in some)
            for some in (set(layers[:third]), set(layers[-third:]))
        ]
        said += f". The median cell of the first third of the layers has {_spelled(ends[0], figure)}, of the last "
        said += _spelled(ends[1], figure)
    return f"{said}."


def _place(grid: Grid, cell: Cell) -> str:
    row, column = cell
    return f"{row}, {grid.layer_name(column)}"
