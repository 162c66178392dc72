"""Draw a line plot in characters, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckptdiff.report.screen import Screen
from ckptdiff.report.text import percent

__all__ = ["plot_lines"]

_HEIGHT = 10
_WIDTH = 64
_STYLES = ("cyan", "yellow", "magenta")
_MARKS, _PLAIN_MARKS = "●○◆", "*o+"


def plot_lines(series: Mapping[str, Sequence[float]], screen: Screen) -> list[str]:
    """Draw series of shares over their index, from zero to the largest.

    Parameters
    ----------
    series : mapping of str to sequence of float
        At most three, of equal length; where two meet, the first is seen.
    screen : Screen

    Returns
    -------
    list of str
        No lines if there is nothing but zeros.
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
    lines = []
    for row in range(_HEIGHT):
        label = {0: percent(top), _HEIGHT - 1: "0 %"}.get(row, "")
        body = "".join(cells.get((row, column), " ") for column in range(width))
        lines.append(f"{label:>{label_width}} {'│' if screen.blocks else '|'} {body}".rstrip())
    legend = "   ".join(
        f"{screen.paint(mark, style)} {name}" for name, (_, mark, style) in zip(series, drawn, strict=True)
    )
    return [*lines, f"{'':>{label_width}} {'└' if screen.blocks else '+'} {legend}"]
