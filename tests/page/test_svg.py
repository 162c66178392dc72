"""Scales that everybody can read, and axes with round numbers."""

from __future__ import annotations

import numpy as np
import pytest

from ckptdiff.page.markup import Html, exact, tag, text
from ckptdiff.page.svg import DIVERGING, SEQUENTIAL, SERIES, Axis, color, ink, nice_step

# Linear RGB as protanopes, deuteranopes and tritanopes see it: Machado, Oliveira, Fernandes 2009, severity 1.
SEEN = {
    "all": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(code: str, seen: str) -> np.ndarray:
    """CIE L*a*b* of a colour, as some see it."""
    srgb = np.array([int(code[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.asarray(SEEN[seen]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    ratio = xyz / [0.95047, 1.0, 1.08883]
    root = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


@pytest.mark.parametrize("seen", SEEN)
def test_small_is_darker_than_large_to_everybody(seen: str) -> None:
    lightness = [lab(color(SEQUENTIAL, share), seen)[0] for share in np.linspace(0, 1, 33)]
    assert np.all(np.diff(lightness) > 0.5)


@pytest.mark.parametrize("seen", SEEN)
def test_below_and_above_zero_are_told_apart_by_everybody(seen: str) -> None:
    for size in (0.25, 0.5, 1.0):
        below, above = (lab(color(DIVERGING, 0.5 + side * size / 2), seen) for side in (-1, 1))
        assert np.linalg.norm(below - above) > 30
    middle = [lab(color(DIVERGING, share), seen)[0] for share in (0.0, 0.5, 1.0)]
    assert middle[1] > max(middle[0], middle[2]) + 25


@pytest.mark.parametrize("seen", SEEN)
def test_two_runs_are_told_apart_by_everybody(seen: str) -> None:
    assert np.linalg.norm(lab(SERIES[0], seen) - lab(SERIES[1], seen)) > 30


def contrast(one: str, other: str) -> float:
    """Of WCAG 2."""
    light = sorted(((lab(code, "all")[0] + 16) / 116) ** 3 for code in (one, other))
    return float((light[1] + 0.05) / (light[0] + 0.05))


def test_figures_are_legible_on_their_cells_and_marks_on_both_grounds() -> None:
    for scale in (SEQUENTIAL, DIVERGING):
        for share in np.linspace(0, 1, 65):
            fill = color(scale, share)
            assert contrast(fill, ink(fill)) > 4.3
    for mark in SERIES:
        assert min(contrast(mark, "#ffffff"), contrast(mark, "#14171b")) > 2.9


@pytest.mark.parametrize("span", [1e-7, 0.03, 0.9, 1.0, 7.0, 123456.0])
def test_ticks_are_round_and_few(span: float) -> None:
    axis = Axis(0.0, span, 0.0, 300.0)
    ticks = axis.ticks(5)
    assert 2 <= len(ticks) <= 6 and ticks[0] == 0.0 and ticks[-1] <= span
    assert all(0 <= axis.at(tick) <= 300 for tick in ticks)
    assert f"{nice_step(span, 5):e}"[0] in "125"


def test_a_flat_axis_has_places() -> None:
    assert Axis(0.0, 0.0, 10.0, 20.0).at(0.0) == 10.0 and Axis(0.0, 0.0, 10.0, 20.0).ticks() == [0.0]


def test_what_is_no_markup_is_escaped() -> None:
    assert tag("p", "<b>&", title='"\n') == '<p title="&quot;\\x0a">&lt;b&gt;&amp;</p>'
    assert tag("p", Html("<b>x</b>"), None, class_=None) == "<p><b>x</b>None</p>"
    assert exact("a 5 %<") == "a 5 %&lt;" and text("a %") == "a %"
    assert text("5 %") == "5\u00a0%" and tag("rect", x=1.0, y=2.345) == '<rect x="1" y="2.35"/>'
