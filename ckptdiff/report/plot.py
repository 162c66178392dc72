"""Draw plots in characters, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ckptdiff.report.screen import Screen
from ckptdiff.report.text import percent

_WIDTH = 64
_HEIGHT = 10
_STYLES = ("cyan", "yellow", "magenta")
_MARKS, _PLAIN_MARKS = "●○◆", "*o+"

_DECAY_HEIGHT = 12
_DECAY_MARKS, _PLAIN_DECAY_MARKS = {"delta": "●", "base": "·"}, {"delta": "o", "base": "."}
_DECAY_LABEL = 8


def plot_lines(series: Mapping[str, Sequence[float]], screen: Screen) -> list[str]:
    """Draw series of shares over their index, from zero to the largest; no lines if there is nothing but zeros.

    There are at most three, of equal length; where two meet, the first is seen.
    """
    top = max((value for values in series.values() for value in values), default=0.0)
    if not top > 0.0:
        return []
    marks = _MARKS if screen.blocks else _PLAIN_MARKS
    label_width = max(len(percent(top)), len("0 %"))
    count = max(map(len, series.values()))
    width = min(_WIDTH, (screen.width or 80) - label_width - 4)
    step = (width - 1) / max(count - 1, 1)
    cells: dict[tuple[int, int], str] = {}
    drawn = list(zip(series.values(), marks, _STYLES, strict=False))
    for values, mark, style in reversed(drawn):
        for index, value in enumerate(values):
            cells[round((_HEIGHT - 1) * (1 - value / top)), round(index * step)] = screen.paint(mark, style)
    legend = "   ".join(
        f"{screen.paint(mark, style)} {name}" for name, (_, mark, style) in zip(series, drawn, strict=True)
    )
    labels = [percent(top), *[""] * (_HEIGHT - 2), "0 %"]
    lines = _rows(cells, width, labels, label_width, "│ " if screen.blocks else "| ")
    return [*lines, f"{'':>{label_width}} {'└' if screen.blocks else '+'} {legend}"]


def decay_lines(values: Mapping[str, NDArray[np.float64]], screen: Screen) -> list[str]:
    """Draw s_i / s_1 of the update of a matrix and of its base over i, both axes logarithmic.

    The values of "delta" and "base" come largest first, shape (n,), without NaN; zeros are not drawn.
    """
    curves = {}
    for key in ("base", "delta"):
        found = values.get(key, np.empty(0))
        if found.size and found[0] > 0:
            curves[key] = found[found > 0] / found[0]
    if not curves:
        return ["no singular values"]
    last = max(curve.size for curve in curves.values())
    lowest = min(-0.1, max(-12.0, min(math.log10(curve[-1]) for curve in curves.values())))
    marks = _DECAY_MARKS if screen.blocks else _PLAIN_DECAY_MARKS
    cells: dict[tuple[int, int], str] = {}
    for key, curve in curves.items():
        for column in range(_WIDTH):
            index = round(last ** (column / (_WIDTH - 1))) - 1 if last > 1 else 0
            if index < curve.size and (place := math.log10(curve[index]) / lowest) <= 1:
                cells[min(_DECAY_HEIGHT - 1, int(place * _DECAY_HEIGHT)), column] = marks[key]
    labels = [f"{10 ** (lowest * row / _DECAY_HEIGHT):.0e}" if row % 3 == 0 else "" for row in range(_DECAY_HEIGHT)]
    margin = " " * _DECAY_LABEL
    return [
        *_rows(cells, _WIDTH, labels, _DECAY_LABEL, "|"),
        f"{margin} +{'-' * _WIDTH}",
        f"{margin}  1{last:>{_WIDTH - 1},}",
        f"{margin}  s_i / s_1:  {marks['delta']} update   {marks['base']} base",
    ]


def _rows(
    cells: Mapping[tuple[int, int], str], width: int, labels: Sequence[str], label_width: int, edge: str
) -> list[str]:
    """A line for each label, with the marks of that row behind it; cells are marks by row and column."""
    bodies = ("".join(cells.get((row, column), " ") for column in range(width)) for row in range(len(labels)))
    return [f"{label:>{label_width}} {edge}{body}".rstrip() for label, body in zip(labels, bodies, strict=True)]
