"""Pictures over the steps of a track: lines, and what each two steps have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ckptdiff.page.heatmap import Row
from ckptdiff.page.markup import Html, tag
from ckptdiff.page.svg import DIVERGING, SEQUENTIAL, SERIES, Axis, color, ink, legend, line, picture, shares_axis, word
from ckptdiff.report.text import number, percent

WIDTH = 370
LEFT, RIGHT, TOP, BOTTOM = 44.0, 362.0, 26.0, 172.0
_WIDEST, _WRITTEN = 40.0, 30.0
"""Of a cell: at most, and from where on its figure is written in it."""
_SHADES = 24


def step_axis(x: Axis, down: float = BOTTOM) -> list[Html]:
    """An axis of steps, of which 0 is the base."""
    marks = [line(x.start, down, x.end, down, stroke_opacity=0.6)]
    every = max(1, math.ceil(x.high / 10))
    marks += [word(x.at(at), down + 16, at, "middle") for at in range(0, int(x.high) + 1, every)]
    return [*marks, word((x.start + x.end) / 2, down + 32, "step; 0 is the base", "middle")]


def step_lines(
    title: str, upright: str, keys: Mapping[str, str], steps: Sequence[Row], said: str, base: float | None = 0.0
) -> Html:
    """A figure of lines of shares over the steps, by name and key, from their value at the base on.

    What a null gives, under a key that ends in "_null", is dashed, in the colour of what it follows.
    """
    x = Axis(0, len(steps), LEFT, RIGHT)
    top = max((row[key] or 0.0 for key in keys.values() for row in steps), default=0.0)
    y = Axis(0.0, top * 1.05 or 1.0, BOTTOM, TOP)
    marks = [*shares_axis(y, LEFT, RIGHT, upright), *step_axis(x)]
    entries: list[tuple[str, str, str]] = []
    measured = [name for name, key in keys.items() if not key.endswith("_null")]
    color_of = iter(SERIES)
    stroke = SERIES[0]
    for name, key in keys.items():
        null = name not in measured
        stroke = stroke if null else next(color_of)
        entries.append(("dashes" if null else "dot", stroke, name))
        values = [base, *(row[key] for row in steps)]
        known = [(x.at(at), y.at(value), value, at) for at, value in enumerate(values) if value is not None]
        points = " ".join(f"{across:.1f},{up:.1f}" for across, up, _, _ in known)
        below = len(measured) == len(keys) == 2 and name == measured[0]  # the other one, where both are one
        look = {"stroke_width": 6 if below else 2, "stroke_dasharray": "4 3" if null else None}
        marks.append(tag("polyline", points=points, fill="none", stroke=stroke, **look))
        marks += [
            tag(
                "circle",
                tag("title", f"{name}, step {at}: {percent(value)}"),
                cx=across,
                cy=up,
                r=2 if null else 3,
                fill=stroke,
            )
            for across, up, value, at in known
        ]
    if len(keys) > 1:
        marks += legend(LEFT, BOTTOM + 50, entries)
    height = BOTTOM + 40 + (16 * len(keys) if len(keys) > 1 else 0)
    return tag("figure", tag("h3", title), picture(WIDTH, height, title, *marks), tag("figcaption", said))


def step_matrix(title: str, values: Sequence[Sequence[float | None]], said: str, *, signed: bool) -> Html:
    """A figure of what each two steps have in common: from 0 to 1, or, if it has a sign, from -1 to 1."""
    size = min((RIGHT - LEFT) / len(values), _WIDEST)
    scale, low = (DIVERGING, -1.0) if signed else (SEQUENTIAL, 0.0)
    every = max(1, math.ceil(20 / size))
    marks = [word(2, 12, "step")]
    for down, row in enumerate(values):
        y = TOP + down * size
        if down % every == 0:
            marks += [word(LEFT - 6, y + size / 2 + 4, down + 1, "end")]
            marks += [word(LEFT + (down + 0.5) * size, TOP - 4, down + 1, "middle")]
        for across, value in enumerate(row):
            place = {"x": LEFT + across * size, "y": y, "width": size - 0.5, "height": size - 0.5}
            hint = tag("title", f"steps {down + 1} and {across + 1}: {number(value)}")
            if value is None:
                marks.append(tag("rect", hint, fill="none", stroke="currentColor", stroke_opacity=0.3, **place))
                continue
            fill = color(scale, (value - low) / (1.0 - low))
            marks.append(tag("rect", hint, fill=fill, **place))
            if size >= _WRITTEN:
                middle = LEFT + (across + 0.5) * size, y + size / 2 + 4
                marks.append(word(*middle, f"{value:.2f}", "middle", fill=ink(fill), pointer_events="none"))
    under = TOP + len(values) * size + 12
    for at in range(_SHADES):
        fill = color(scale, (at + 0.5) / _SHADES)
        marks.append(tag("rect", x=LEFT + at * 200 / _SHADES, y=under, width=200 / _SHADES + 0.3, height=10, fill=fill))
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        marks.append(word(LEFT + 200 * share, under + 24, f"{low + share * (1.0 - low):g}", anchor))
    return tag("figure", tag("h3", title), picture(WIDTH, under + 32, title, *marks), tag("figcaption", said))
