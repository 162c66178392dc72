"""Pages in a real browser: silent, self-contained and readable, with scripts and styles or without."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, chromium
from synthetic_runs import with_spectra

from ckptdiff.figures.result import Diff
from ckptdiff.page import read_run, run_page
from ckptdiff.page.track_page import track_page
from ckptdiff.track import Track
from ckptdiff.track.subspaces import Locking

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chromium")]

HOSTILE = "</script><img src=x onerror=alert(1)>"
KINDS = ("run", "special", "against", "many", "track")
# Each section's box, and what of its own is wider than the page and cannot be scrolled.
BOXES = """[...document.querySelectorAll("section")].map(one => {
  const box = one.getBoundingClientRect(), style = getComputedStyle(one);
  return {id: one.id, top: box.top + scrollY, left: box.left, right: box.right, height: box.height,
          shown: style.display !== "none" && style.visibility === "visible" && style.opacity === "1"};
})"""
OVERLAPS = """[...document.querySelectorAll("svg")].flatMap(svg => {
  const words = [...svg.querySelectorAll("text")].map(word => [word.textContent, word.getBoundingClientRect()]);
  return words.flatMap(([one, a], at) => words.slice(at + 1).filter(([, b]) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3
  ).map(([other]) => svg.getAttribute("aria-label") + ": " + one + " | " + other));
})"""

CUT = """[...document.querySelectorAll("svg")].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter(word => {
    const at = word.getBoundingClientRect();
    return at.left < box.left - 1 || at.right > box.right + 1 || at.bottom > box.bottom + 1;
  }).map(word => svg.getAttribute("aria-label") + ": " + word.textContent);
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if chromium() is None:
        if os.environ.get("CKPTDIFF_NEED_CHROMIUM") == "1":
            pytest.fail("CKPTDIFF_NEED_CHROMIUM=1, but there is no chromium")
        pytest.skip("no chromium, chromium-browser or google-chrome in PATH")
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(make_run, make_diff, make_facts, diff: Diff, troubled_diff: Diff, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    special = replace(
        troubled_diff,
        warnings=(HOSTILE,),
        tensors=(replace(troubled_diff.tensors[0], name=HOSTILE), *troubled_diff.tensors[1:]),
    )
    diffs = {"run": with_spectra(diff), "special": with_spectra(special), "many": with_spectra(make_diff(layers=130))}
    runs = {name: read_run(make_run(folder / f"{name}.h5", one)) for name, one in diffs.items()}
    sizes = np.array([128, 64])
    counts = {
        key: np.array([sizes // 8, sizes // 4, sizes // 2]) for key in ("support", "touched", "reverted", "churned")
    }
    norms = np.ones((3, 2))
    shapes = ((16, 8), (8, 8))
    names = ("model.layers.0.mlp.up_proj.weight", HOSTILE)
    products = np.tile([1.0, 1.0, 3.0, -0.5, 1.0, 2.0], (2, 1))
    locking = Locking(*np.linspace(0, 1, 24).reshape(4, 2, 3))
    known = "base", ("a", "b", "c"), "bf16", names, shapes, counts, norms[0], norms, (HOSTILE,)
    track = Track(*known, products, locking)
    written = {
        "run": run_page([runs["run"]]),
        "special": run_page([runs["special"]]),
        "many": run_page([runs["many"]]),
        "against": run_page([runs["run"], runs["many"]], "the runs hold no masks."),
        "track": track_page(track, "track.h5"),
    }
    found = {name: folder / f"{name}.html" for name in written}
    for name, parts in written.items():
        found[name].write_text("".join(parts), encoding="utf-8")
    return found


@pytest.mark.parametrize("scripts", [True, False])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_silent_and_every_section_is_seen(
    browser: Browser, pages: dict[str, Path], kind: str, width: int, scripts: bool
) -> None:
    browser.open(pages[kind], width=width, scripts=scripts, dark=width == 390)
    sections = browser.evaluate(BOXES)
    assert [
        one["id"] for one in sections if one["id"] in ("provenance", "heatmap", "distributions", "spectra", "tensors")
    ] == [
        "provenance",
        "heatmap",
        "distributions",
        "spectra",
        "tensors",
    ]
    below = 0.0
    for one in sections:
        assert one["shown"] and one["height"] > 30 and one["top"] >= below, one
        assert one["left"] >= 0 and one["right"] <= width, one
        below = one["top"] + one["height"]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(OVERLAPS) == [] and browser.evaluate(CUT) == []
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert browser.asked_for() == [pages[kind].as_uri()] and browser.said() == []


@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_is_readable_where_style_and_script_are_forbidden(
    browser: Browser, pages: dict[str, Path], tmp_path: Path, width: int
) -> None:
    plain = tmp_path / "plain.html"
    strict = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:"/>'
    plain.write_text(
        pages["run"].read_text(encoding="utf-8").replace('<meta charset="utf-8"/>', f'<meta charset="utf-8"/>{strict}')
    )
    browser.open(plain, width=width)
    assert browser.evaluate("getComputedStyle(document.body).maxWidth") == "none"  # the style sheet is refused
    below = 0.0
    for one in browser.evaluate(BOXES):
        assert one["shown"] and one["height"] > 30 and one["top"] >= below, one
        below = one["top"] + one["height"]
    assert browser.evaluate(OVERLAPS) == []
    wide = "[...document.querySelectorAll('svg')].every(svg => svg.getBoundingClientRect().right <= innerWidth)"
    assert browser.evaluate(wide)


def test_with_scripts_rows_are_sorted_and_filtered_and_figures_chosen(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"], width=1280)
    figures = "[...document.querySelectorAll('#heatmap figure')]"
    seen = f"{figures}.filter(one => one.offsetParent).map(one => one.dataset.title)"
    assert browser.evaluate(seen) == ["unchanged"]
    browser.evaluate(
        "(s => {s.selectedIndex = 1; s.dispatchEvent(new Event('change'))})(document.querySelector('select'))"
    )
    assert browser.evaluate(seen) == ["relative update"]
    cell = "document.querySelector('#heatmap figure:not([hidden]) path')"
    browser.evaluate(f"{cell}.dispatchEvent(new Event('pointerover', {{bubbles: true}}))")
    assert "embed_tokens" in browser.evaluate("document.querySelector('output').textContent")

    def column(at: int) -> list[str]:
        rows = "[...document.querySelectorAll('#rows tbody tr')].filter(row => !row.hidden)"
        cells = browser.evaluate(f"{rows}.map(row => row.cells[{at}].textContent)")
        return [cell.replace("\xa0%", "") for cell in cells]

    shares = sorted(map(float, column(4)))
    browser.evaluate("document.querySelectorAll('#rows th')[4].click()")
    assert list(map(float, column(4))) == shares[::-1]
    browser.evaluate("document.querySelectorAll('#rows th')[4].click()")
    assert list(map(float, column(4))) == shares
    browser.evaluate("document.querySelectorAll('#rows th')[9].click()")
    undefined = [cell == "n/a" for cell in column(9)]
    assert any(undefined) and undefined == sorted(undefined)
    browser.evaluate(
        "(i => {i.value = 'LAYERS.1.mlp'; i.dispatchEvent(new Event('input'))})(document.querySelector('input'))"
    )
    assert len(column(0)) == 3 and all("layers.1.mlp" in name for name in column(0))
    assert browser.said() == []
