"""Pictures as SVG: scales, axes and marks, whose looks stand in presentation attributes alone.

Text and lines take the colour of the text around them, and all other colours are seen on white and on black.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ckptdiff.page.markup import Html, tag

SEQUENTIAL = ("#10234f", "#2d4779", "#4f6b8a", "#7c8f8f", "#abae88", "#d8cd75", "#f9ee62")
"""From small to large: from dark blue to light yellow, each lighter than the last, also to the colour-blind."""
DIVERGING = ("#1b4f8f", "#5b8fc4", "#adc9e3", "#f2f2ee", "#f0c48b", "#d98a33", "#9a5206")
"""From below through zero to above: blue, near white, orange, which no colour-blindness takes for one another."""
SERIES = ("#2f7fc1", "#d5802b")
"""The first and the second run."""
NULL = "#8a8a8a"
"""What chance or rounding would give."""
FONT = 12
_BROAD = 480
"""Wider pictures are scrolled on a small screen, not shrunk."""
_LETTER = 7.4
"""Units that a letter takes, about."""


def color(scale: Sequence[str], share: float) -> str:
    """A colour of a scale, at 0..1."""
    place = min(max(share, 0.0), 1.0) * (len(scale) - 1)
    first = min(int(place), len(scale) - 2)
    mixed = (
        round(low + (high - low) * (place - first))
        for low, high in zip(_channels(scale[first]), _channels(scale[first + 1]), strict=True)
    )
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _channels(code: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(code[1:]))


def ink(fill: str) -> str:
    """Black or white, whichever is read better on a colour."""
    linear = [(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in (v / 255 for v in _channels(fill))]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


class Picture(Html):
    """A picture, as SVG; notebooks show it with its heading and the sentence that says what it shows."""

    __slots__ = ("heading", "said")
    heading: str
    said: str

    def __new__(cls, svg: Html, heading: str, said: str) -> Picture:
        """A picture under a heading, and the sentence."""
        made = super().__new__(cls, svg)
        made.heading, made.said = heading, said
        return made

    def _repr_html_(self) -> str:
        """What notebooks show."""
        return tag("figure", tag("h3", self.heading), self, tag("figcaption", self.said))


def picture(width: float, height: float, label: str, *marks: object) -> Html:
    """A picture of a size; where the page is narrower it shrinks, and `label` is what a screen reader says."""
    return tag(
        "svg",
        *marks,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        width="100%",
        height=f"{height:g}",
        preserveAspectRatio="xMinYMin meet",
        role="img",
        aria_label=label,
        class_="broad" if width > _BROAD else None,
        font_family="system-ui, sans-serif",
        font_size=FONT,
        fill="currentColor",
    )


def word(x: float, y: float, content: object, anchor: str | None = None, **attributes: object) -> Html:
    """Text at a place; `anchor` is "middle" or "end"."""
    return tag("text", content, x=float(x), y=float(y), text_anchor=anchor, **attributes)


def width_of(content: str) -> float:
    """About how wide text is."""
    return len(content) * _LETTER


def shortened(content: str, letters: int) -> str:
    """Text of at most so many letters."""
    return content if len(content) <= letters else content[: letters - 1] + "…"


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale from values to places."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The place of a value."""
        return self.start + (value - self.low) / ((self.high - self.low) or 1.0) * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values between both ends, at most `most` and one."""
        step = nice_step(self.high - self.low, most)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def nice_step(span: float, most: int) -> float:
    """1, 2 or 5 times a power of ten, so that `most` of it or fewer fill a span."""
    if not span > 0.0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(step for step in (power, 2 * power, 5 * power, 10 * power) if span / step <= most + 1e-9)


def share_text(value: float) -> str:
    """A tick of an axis of shares, in percent without the sign, which stands in the label of the axis."""
    return f"{100 * value:.6g}"


def line(x1: float, y1: float, x2: float, y2: float, **attributes: object) -> Html:
    """A thin line in the colour of text."""
    look = {"stroke": "currentColor", "stroke_opacity": 0.25, **attributes}
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), **look)


def shares_axis(axis: Axis, left: float, right: float, label: str) -> list[Html]:
    """An upright axis of shares with lines across the picture, and its label above."""
    marks = [word(2, FONT, label)]
    for value in axis.ticks(4):
        y = axis.at(value)
        marks += [line(left, y, right, y), word(left - 5, y + 4, share_text(value), "end")]
    return marks


def legend(x: float, y: float, entries: Sequence[tuple[str, str, str]]) -> list[Html]:
    """Which mark stands for what, one below the other: kind ("bar", "line", "dashes" or "diamond"), colour, words."""
    marks: list[Html] = []
    for row, (kind, fill, words) in enumerate(entries):
        at = y + 16 * row
        if kind == "bar":
            marks.append(tag("rect", x=float(x), y=at - 9, width=14, height=9, fill=fill))
        elif kind == "diamond":
            marks.append(diamond(x + 7, at - 4, fill))
        elif kind == "dot":
            marks.append(tag("circle", cx=x + 7, cy=at - 4, r=4, fill=fill))
        else:
            dashes = "4 3" if kind == "dashes" else None
            marks.append(
                line(x, at - 4, x + 14, at - 4, stroke=fill, stroke_opacity=1, stroke_width=2, stroke_dasharray=dashes)
            )
        marks.append(word(x + 20, at, words))
    return marks


def diamond(x: float, y: float, fill: str) -> Html:
    """A hollow mark, for what is no measurement."""
    return tag("path", d=f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z", fill="none", stroke=fill, stroke_width=2)
