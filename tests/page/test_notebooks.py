"""Results show themselves in notebooks."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from read_page import Page
from synthetic_runs import with_spectra

import ckptdiff
from ckptdiff.errors import OptionError
from ckptdiff.figures.result import Diff
from ckptdiff.overlap import overlap
from ckptdiff.page import read_run, run_page
from ckptdiff.page.heatmap import UPDATE_FIGURES
from ckptdiff.page.spectra_picture import KINDS
from ckptdiff.report.text import percent
from ckptdiff.runfile.reader import RunFile
from ckptdiff.track import track

FIXTURES = Path(__file__).parents[2] / "fixtures"


def test_a_diff_and_its_run_file_show_figures_and_a_heatmap(make_run, diff: Diff, tmp_path: Path) -> None:
    page = Page(diff._repr_html_())
    assert percent(diff.overall["unchanged_bitwise"]) in page.said("headline")
    assert len(page.pictures()) == 1 and len(page.hints("heatmap of unchanged")) == 18
    assert not {"script", "style", "link"} & {tag for tag, _ in page.elements}
    with RunFile(make_run(tmp_path / "run.h5", with_spectra(diff))) as run:
        assert len(Page(run._repr_html_()).pictures()) == 1


def test_a_diff_of_integers_shows_no_heatmap(make_diff, make_facts) -> None:
    ids = make_facts("ids", (1, 16), dtype_base="I64", dtype_tuned="I64", compare="bitwise")
    assert Page(make_diff(tensors=[(ids, 0.5)])._repr_html_()).pictures() == []


def test_pictures_one_by_one_are_those_of_the_report(tmp_path: Path) -> None:
    run = tmp_path / "run.h5"
    diff = ckptdiff.diff(FIXTURES / "llama" / "base", FIXTURES / "llama" / "tuned", out=run, spectra="exact")
    report = Page("".join(run_page([read_run(run)])))
    with RunFile(run) as file:
        plots = [file.plot, diff.plot]
        drawn = [file.plot.distribution(of) for of in ("sizes", "steps", "weights")]
    for plot in plots:
        drawn += [plot.heatmap(figure.title) for figure in UPDATE_FIGURES]
        drawn += [plot.spectra(key) for key in KINDS]
    said = "".join(map(report.said, report.sections()))
    for picture in drawn:
        assert picture in report.source  # as it is
        assert picture.startswith("<svg") and ElementTree.fromstring(picture).get("role") == "img"
        shown = Page(picture._repr_html_())
        assert len(shown.pictures()) == 1 and shown.said("figcaption").startswith(picture.said[:10])
        assert picture.said.split(". ")[0] in said
    assert diff.plot.heatmap() == drawn[3] and diff.plot.spectra() == drawn[3 + len(UPDATE_FIGURES)]


def test_what_cannot_be_drawn_is_refused(make_diff) -> None:
    diff = ckptdiff.diff(FIXTURES / "llama" / "base", FIXTURES / "llama" / "tuned")
    for draw, message in (
        (lambda: diff.plot.heatmap("unchangd"), "expected: unchanged, relative update"),
        (lambda: diff.plot.heatmap("top-16 energy"), "undefined for this pair"),
        (lambda: diff.plot.spectra("stable_rank"), "there are no spectra"),
        (lambda: diff.plot.spectra("stable"), "no such picture"),
        (lambda: diff.plot.distribution("sizes"), "a run file holds them"),
        (lambda: make_diff(tensors=[]).plot.heatmap(), "undefined for this pair"),
    ):
        with pytest.raises(OptionError) as caught:
            draw()
        assert message in str(caught.value)


def test_a_track_shows_its_steps() -> None:
    found = track(FIXTURES / "llama" / "base", [FIXTURES / "llama" / "tuned"])
    page = Page(found._repr_html_())
    assert page.cells["coverage" if "coverage" in page.cells else ""][-1][1] == percent(
        found.overall()[0]["support_fraction"]
    )
    assert len(page.pictures()) == 1


def test_overlaps_show_each_pair(tmp_path: Path) -> None:
    sides = (FIXTURES / "llama" / "base", FIXTURES / "llama" / "tuned")
    runs = [tmp_path / f"{rule}.h5" for rule in ("abs", "top", "bitwise")]
    for run, rule in zip(runs, ("abs:1e-5", "top:5", "bitwise"), strict=True):
        ckptdiff.diff(*sides, out=run, mask=rule)
    found = overlap(runs)
    page = Page(found._repr_html_())
    wholes = [row for row in page.cells["overlap"] if row[0] == "all"]
    assert [row[12] for row in wholes] == [percent(found.overall(pair)["jaccard"]) for pair in found.pairs]
    assert len(page.pictures()) == 3
