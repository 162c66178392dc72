"""Pictures of distributions: sizes of changes, and of the weights they fall on, by powers of two."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ckptdiff.measure.histograms import LOG2_LOWEST
from ckptdiff.page.markup import Html, left_out, section, tag
from ckptdiff.page.shown_run import Floats, ShownRun
from ckptdiff.page.svg import NULL, Axis, Picture, legend, line, picture, shares_axis, word
from ckptdiff.report.text import number, percent

_WIDTH = 370
_LEFT, _RIGHT, _TOP, _BOTTOM = 40.0, 348.0, 26.0, 172.0
_FAINT = 1e-3
"""Bins at either end that hold less are left out."""


@dataclass(frozen=True, slots=True)
class Series:
    """Shares of bins, and how they are drawn: "bar", "line" or "dashes"."""

    name: str
    shares: Floats
    kind: str
    color: str


def distributions_section(runs: Sequence[ShownRun]) -> Html:
    """The section of distributions, of one run or of two in the same pictures."""
    title, known = "Distributions", [run for run in runs if run.distributions is not None]
    if not known:
        return section("distributions", title, left_out("the run file holds no histograms."))
    missing = [left_out(f"{run.prefix}{run.name} holds no histograms.") for run in runs if run.distributions is None]
    drawn = [figure for draw in DISTRIBUTIONS.values() if (figure := draw(known)) is not None]
    if not drawn:
        return section("distributions", title, left_out("no floating value changed."))
    shown = (Html(figure._repr_html_()) for figure in drawn)
    return section("distributions", title, *missing, tag("div", *shown, class_="figures"))


def _sizes(runs: Sequence[ShownRun]) -> Picture | None:
    series, said = [], []
    for run in runs:
        assert run.distributions is not None
        counts = run.distributions.delta
        if counts[1:].sum() > 0:
            series.append(_series(run, counts[1:] / counts.sum()))
            still = percent(counts[0] / counts.sum())
            half = number(_middle(counts[1:]))
            said.append(f"{run.prefix}{still} of the values have d = 0; half of the others moved by less than {half}")
    return _figure("Size of the changes", "|d|, by powers of two", "of all values, %", LOG2_LOWEST, series, said)


def _steps(runs: Sequence[ShownRun]) -> Picture | None:
    series, said = [], []
    for run in runs:
        assert run.distributions is not None
        counts = run.distributions.ulp
        if counts.sum() > 0:
            shares = counts / counts.sum()
            series.append(_series(run, shares))
            one, many = percent(shares[0]), percent(shares[3:].sum())
            said.append(f"{run.prefix}{one} of the changed values moved by one unit, {many} by eight or more")
    title = "Distance in units of the last place"
    return _figure(title, "distance, by powers of two", "of the changed, %", 0, series, said)


def _weights(runs: Sequence[ShownRun]) -> Picture | None:
    series, said = [], []
    for run in runs:
        assert run.distributions is not None
        counts, null = run.distributions.changed, run.distributions.null
        if counts[1:].sum() > 0 and null[1:].sum() > 0:
            series.append(_series(run, counts[1:] / counts.sum()))
            name = f"rounded noise, {run.prefix}".rstrip(", :")
            series.append(Series(name, null[1:] / null.sum(), "dashes", run.color if run.prefix else NULL))
            halves = [number(_middle(found[1:])) for found in (counts, null)]
            words = f"half of the changed weights are below {halves[0]}; of those that noise changes, below {halves[1]}"
            said.append(f"{run.prefix}{words}")
    title = "Weights that changed, beside rounded noise"
    return _figure(title, "|W0|, by powers of two", "of the changed, %", LOG2_LOWEST, series, said)


DISTRIBUTIONS: Mapping[str, Callable[[Sequence[ShownRun]], Picture | None]] = {
    "sizes": _sizes,
    "steps": _steps,
    "weights": _weights,
}
"""Each picture by its name, of one run or of two; None where nothing changed."""


def _series(run: ShownRun, shares: Floats) -> Series:
    name = f"{run.prefix}{run.name}" if run.prefix else "this pair"
    return Series(name, shares, "line" if run.place else "bar", run.color)


def _middle(counts: Floats) -> float:
    """The median of what is counted by floor(log2), its bins taken as even in the logarithm."""
    sums = np.cumsum(counts)
    at = int(np.searchsorted(sums, sums[-1] / 2))
    within = (sums[-1] / 2 - (sums[at] - counts[at])) / counts[at]
    return float(2.0 ** (LOG2_LOWEST + at + within))


def _figure(
    title: str, across: str, upright: str, lowest: int, series: Sequence[Series], said: Sequence[str]
) -> Picture | None:
    if not series:
        return None
    shown = np.flatnonzero(np.max([one.shares for one in series], axis=0) >= _FAINT)
    first, last = int(shown[0]), int(shown[-1])
    x = Axis(lowest + first, lowest + last + 1, _LEFT, _RIGHT)
    top = max(float(one.shares.max()) for one in series)
    y = Axis(0.0, top * 1.05, _BOTTOM, _TOP)
    marks: list[Html] = shares_axis(y, _LEFT, _RIGHT, upright)
    for one in series:
        marks.append(_drawn(one, first, last, lowest, x, y))
    marks += _ticks(x, log10=lowest < 0)
    marks.append(word((_LEFT + _RIGHT) / 2, _BOTTOM + 32, across, "middle"))
    if len(series) > 1:
        marks += legend(_LEFT, _BOTTOM + 50, [(one.kind, one.color, one.name) for one in series])
    height = _BOTTOM + 40 + (16 * len(series) if len(series) > 1 else 0)
    sentence = ". ".join(words[0].upper() + words[1:] for words in said)
    faint = max(float(one.shares[:first].sum() + one.shares[last + 1 :].sum()) for one in series)
    more = f" Bins beyond both ends, {percent(faint)} in all, are not drawn." if faint else ""
    return Picture(picture(_WIDTH, height, title, *marks), title, f"{sentence}.{more}")


def _drawn(one: Series, first: int, last: int, lowest: int, x: Axis, y: Axis) -> Html:
    """The marks of a series: bars, or a line that has the same steps."""
    places = range(first, last + 1)
    if one.kind == "bar":
        width = x.at(1) - x.at(0)
        bars = (
            tag(
                "rect",
                tag("title", f"{_bin(lowest + at)}: {percent(float(one.shares[at]))}"),
                x=x.at(lowest + at) + 0.5,
                y=y.at(float(one.shares[at])),
                width=width - 1,
                height=y.start - y.at(float(one.shares[at])),
            )
            for at in places
            if one.shares[at] > 0
        )
        return tag("g", *bars, fill=one.color)
    points = [f"{x.at(lowest + first):.1f},{y.start:.1f}"]
    for at in places:
        points += [f"{x.at(lowest + at + side):.1f},{y.at(float(one.shares[at])):.1f}" for side in (0, 1)]
    points.append(f"{x.at(lowest + last + 1):.1f},{y.start:.1f}")
    return tag(
        "polyline",
        points=" ".join(points),
        fill="none",
        stroke=one.color,
        stroke_width=2,
        stroke_dasharray="4 3" if one.kind == "dashes" else None,
    )


def _bin(exponent: int) -> str:
    return f"{2.0**exponent:.3g} to {2.0 ** (exponent + 1):.3g}"


def _ticks(x: Axis, *, log10: bool) -> list[Html]:
    """Marks at powers of ten of an axis in powers of two; of units in the last place, at powers of two."""
    marks = [line(x.start, _BOTTOM, x.end, _BOTTOM, stroke_opacity=0.6)]
    scale = math.log2(10) if log10 else 1.0
    low, high = math.ceil(x.low / scale - 1e-9), math.floor(x.high / scale + 1e-9)
    every = max(1, math.ceil((high - low + 1) / 8))
    for power in range(low, high + 1):
        if (power - low) % every == 0:
            place = x.at(power * scale)
            label = f"1e{power}" if log10 else f"{2**power:,}" if power < 14 else f"2^{power}"
            marks += [
                line(place, _BOTTOM, place, _BOTTOM + 4, stroke_opacity=0.6),
                word(place, _BOTTOM + 16, label, "middle"),
            ]
    return marks
