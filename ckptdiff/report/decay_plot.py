"""Plot the singular values of one tensor in characters."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ckptdiff.report.screen import Screen

__all__ = ["decay_plot"]

_MARKS = {"delta": "●", "base": "·"}
_PLAIN_MARKS = {"delta": "o", "base": "."}
_AXIS = 8


def decay_plot(
    values: Mapping[str, NDArray[np.float64]], screen: Screen, width: int = 64, height: int = 12
) -> list[str]:
    """Draw s_i / s_1 of the update and of its base over i, both axes logarithmic.

    Parameters
    ----------
    values : mapping of str to float64 array
        "delta" and "base", largest first, without NaN; zeros are not drawn.
    screen : Screen
    width, height : int
        Of the plot's area.
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
    marks = _MARKS if screen.blocks else _PLAIN_MARKS
    area = [[" "] * width for _ in range(height)]
    for key, curve in curves.items():
        for column in range(width):
            index = round(last ** (column / (width - 1))) - 1 if last > 1 else 0
            if index < curve.size:
                place = math.log10(curve[index]) / lowest
                if place <= 1:
                    area[min(height - 1, int(place * height))][column] = marks[key]
    lines = []
    for row, cells in enumerate(area):
        label = f"{10 ** (lowest * row / height):.0e}" if row % 3 == 0 else ""
        lines.append(f"{label:>{_AXIS}} |{''.join(cells).rstrip()}")
    lines.append(" " * _AXIS + " +" + "-" * width)
    lines.append(" " * _AXIS + f"  1{last:>{width - 1},}")
    return [*lines, f"{'':{_AXIS}}  s_i / s_1:  {marks['delta']} update   {marks['base']} base"]
