"""The page of a run file holds its figures, and nothing that could act."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from read_page import Page
from synthetic_runs import with_spectra

from ckptdiff.cli import main
from ckptdiff.figures.result import Diff
from ckptdiff.page import read_run, run_page
from ckptdiff.report.as_json import document
from ckptdiff.report.text import percent, size
from ckptdiff.runfile.reader import RunFile

FIXTURES = Path(__file__).parents[2] / "fixtures"
SECTIONS = ["coverage", "provenance", "headline", "heatmap", "distributions", "spectra", "claims", "movers", "tensors"]
HOSTILE = "</script><img src=x onerror=alert(1)>&lt;\"'\x1b[31m"


def page_of(*paths: Path) -> Page:
    return Page("".join(run_page([read_run(path) for path in paths])))


@pytest.fixture(scope="module")
def run(make_run, diff: Diff, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("page") / "run.h5", with_spectra(diff))


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return page_of(run)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file of real checkpoints, with masks."""
    path = tmp_path_factory.mktemp("llama") / "run.h5"
    sides = [str(FIXTURES / "llama" / side) for side in ("base", "tuned")]
    assert main(["diff", *sides, "-o", str(path), "--mask", "top:5", "--exclude", "*.1.mlp.*", "-q"]) == 1
    return path


def test_sections_are_in_order(page: Page) -> None:
    assert page.sections() == SECTIONS


def test_nothing_is_fetched_and_looks_need_no_style(page: Page) -> None:
    for tag, attributes in page.elements:
        assert "style" not in attributes and not any(name.startswith("on") for name in attributes), tag
        addresses = [attributes[name] for name in ("href", "src", "srcset", "action") if name in attributes]
        assert all(str(address).startswith(("#", "data:,")) for address in addresses)
    assert not re.search(r"url\(|@import|@font-face", page.source)
    (policy,) = (attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv"))
    assert str(policy).startswith("default-src 'none'") and "unsafe" not in str(policy)


def test_pictures_are_sound_and_say_what_they_show(page: Page) -> None:
    pictures = page.pictures()
    assert len(pictures) == 5 + 3 + 4
    for picture in pictures:
        assert picture.get("role") == "img" and picture.get("aria-label")
        _, _, width, height = map(float, str(picture.get("viewBox")).split())
        for mark in picture.iter():
            for name in ("x", "x1", "x2", "cx"):
                assert -1 <= float(mark.get(name, 0)) <= width, (picture.get("aria-label"), mark.attrib)
            for name in ("y", "y1", "y2", "cy"):
                assert -1 <= float(mark.get(name, 0)) <= height, (picture.get("aria-label"), mark.attrib)
    assert page.source.count("<figcaption>") + page.source.count('class="beside"') == len(pictures)


def test_the_heatmap_has_the_figures_of_its_cells(page: Page, diff: Diff) -> None:
    unchanged, numel = defaultdict(float), defaultdict(float)
    for at, facts in enumerate(diff.tensors):
        place = "outside of the layers" if facts.layer is None else f"layer {facts.layer}"
        unchanged[f"{facts.module_type}, {place}"] += float(diff.columns["unchanged_bitwise"][at])
        numel[f"{facts.module_type}, {place}"] += float(diff.columns["numel"][at])
    hints = dict(hint.split(": ") for hint in page.hints("heatmap of unchanged"))
    assert hints == {cell: percent(unchanged[cell] / numel[cell]) for cell in numel}


def test_each_headline_figure_stands_beside_its_null(page: Page, diff: Diff) -> None:
    rows = {row[0]: row[1:] for row in page.cells["headline"]}
    whole = diff.overall
    assert rows["unchanged, after the cast"][:2] == [
        percent(whole["unchanged_bitwise"]),
        percent(whole["unchanged_null"]),
    ]
    low, null = (whole[key]["0.1"] for key in ("low_coverage", "low_coverage_null"))
    assert rows["changes on the 10 % smallest weights"][:2] == [percent(low), percent(null)]
    patch = [size(whole[key]) for key in ("patch_bytes", "dense_bytes")]
    assert rows["the update as a patch of indices and values"][:2] == patch
    assert rows["median matrix: energy in 16 singular values"][1] != "n/a"


def test_every_tensor_has_its_row(page: Page, diff: Diff) -> None:
    rows = page.cells["tensors"][1:]
    assert [row[0] for row in rows] == [facts.name for facts in diff.tensors]
    shares = diff.columns["unchanged_bitwise"] / diff.columns["numel"]
    assert [row[4] for row in rows] == [percent(share) for share in shares.tolist()]


def test_the_document_is_that_of_the_json_report(page: Page, run: Path) -> None:
    with RunFile(run) as file:
        assert page.document() == document(file.load())


def test_hostile_names_stay_text(make_run, make_diff, make_facts, tmp_path: Path) -> None:
    tensors = [(make_facts(HOSTILE, (8, 4), module_type=HOSTILE, layer=0, tower=HOSTILE), 0.5)]
    tensors.append((make_facts("other", (8, 4)), 0.5))
    base = {"path": HOSTILE, "shards": [{"file": HOSTILE, "size": 1, "mtime_ns": 1, "header_sha256": HOSTILE}]}
    diff = make_diff(tensors=tensors, warnings=(HOSTILE,), only_in_base=(HOSTILE,))
    page = page_of(make_run(tmp_path / "run.h5", with_spectra(replace(diff, base={**diff.base, **base}))))
    tags = [tag for tag, _ in page.elements]
    assert "img" not in tags and tags.count("script") == 2
    shown = HOSTILE.replace("\x1b", "\\x1b")
    assert page.cells["tensors"][1][0] == shown and shown in page.said("coverage")
    assert page.document()["tensors"][0]["name"] == HOSTILE
    assert "\x1b" not in page.source
    assert len(page.pictures()) > 5


def test_a_page_depends_on_its_run_file_alone(run: Path, tmp_path: Path) -> None:
    pages = []
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "ckptdiff", "report", str(run), "-o", "-"]
        pages.append(
            subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True)
        )
    assert pages[0].stdout == pages[1].stdout and pages[0].stderr == b""
    assert pages[0].stdout.decode() == page_of(run).source


@pytest.mark.slow
def test_400_tensors_are_below_a_megabyte_and_a_half(make_run, make_diff, tmp_path: Path) -> None:
    diff = with_spectra(make_diff(layers=50))
    assert len(diff.tensors) > 400
    page = page_of(make_run(tmp_path / "run.h5", diff))
    assert len(page.source.encode()) < 1_500_000
    assert len(page.cells["tensors"]) == len(page.document()["tensors"]) + 1 == len(diff.tensors) + 1
    found, exact = page.document()["tensors"][2], document(diff)["tensors"][2]
    assert found["spectral"]["stable_rank"] == pytest.approx(exact["spectral"]["stable_rank"], rel=1e-8)
    assert (
        "rounded to nine digits" in page.source and "tensors lack those of spectra that it does not show" in page.source
    )
    assert found["spectral"].keys() < exact["spectral"].keys()
    assert page.document()["median_2d"]["spectral"].keys() == document(diff)["median_2d"]["spectral"].keys()


@pytest.mark.parametrize(
    ("count", "layers", "first"),
    [pytest.param(30_000, 50, "layer 0", marks=pytest.mark.slow), (3000, 500, "layers 0 to 5")],
)
def test_many_tensors_share_rows(
    make_run, make_diff, make_facts, tmp_path: Path, count: int, layers: int, first: str
) -> None:
    parts = ("gate_proj", "up_proj", "down_proj")
    tensors = [
        (make_facts(f"model.layers.{layer}.mlp.experts.{expert // 3}.{parts[expert % 3]}.weight", (64, 32)), 0.7)
        for layer in range(layers)
        for expert in range(count // layers)
    ]
    page = page_of(make_run(tmp_path / "run.h5", with_spectra(make_diff(tensors=tensors))))
    assert len(page.source.encode()) < 8_000_000
    assert "tensors" not in page.document()
    assert f"more than 1,000 tensors ({len(tensors):,})" in page.said("tensors")
    rows = page.cells["tensors"][1:]
    assert sum(int(row[2].replace(",", "")) for row in rows) == len(tensors)
    assert rows[0][1] == first


def test_what_a_run_file_lacks_is_said(make_run, diff: Diff, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run.h5", diff)
    with h5py.File(path, "r+") as file:
        del file["histograms"]
    page = page_of(path)
    assert page.sections() == SECTIONS
    assert "Left out: the run file holds no histograms." in page.said("distributions")
    assert "Left out: the run file holds no spectra" in page.said("spectra")
    assert "Left out: claims are judged by spectra" in page.said("claims")


def test_identical_sides_have_a_page(make_run, make_diff, make_facts, tmp_path: Path) -> None:
    diff = make_diff(tensors=[(make_facts("model.layers.0.mlp.up_proj.weight", (64, 32)), 1.0)])
    page = page_of(make_run(tmp_path / "run.h5", with_spectra(diff)))
    assert "Identical" in page.said("coverage") and "no tensor has an update" in page.said("movers")
    assert "no matrix with an update" in page.said("spectra")


def test_integers_alone_have_a_page(make_run, make_diff, make_facts, tmp_path: Path) -> None:
    ids = make_facts("ids", (1, 16), dtype_base="I64", dtype_tuned="I64", compare="bitwise")
    page = page_of(make_run(tmp_path / "run.h5", make_diff(tensors=[(ids, 0.5)])))
    assert "nothing to measure" in page.said("headline") and "no floating values" in page.said("heatmap")


def test_everything_special_has_a_page(make_run, troubled_diff: Diff, tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run.h5", with_spectra(troubled_diff)))
    assert "Warning: fp8 tensors are compared as raw codes" in page.said("coverage")
    assert "only in base" in page.said("coverage")
    assert len(page.pictures()) >= 8


def test_the_command_makes_the_run_file_again(llama: Path, tmp_path: Path) -> None:
    (command,) = re.findall(r"<pre>(.*?)</pre>", page_of(llama).source)
    words = shlex.split(command.replace("&#x27;", "'"))
    assert words[0] == "ckptdiff" and words[-1] == str(llama)
    again = tmp_path / "again.h5"
    assert main([*words[1:-1], str(again), "-q"]) == 1
    with RunFile(llama) as one, RunFile(again) as other:
        first, second = one.load(), other.load()
    assert first.mask_rule == second.mask_rule and first.tensors == second.tensors
    for name, values in first.columns.items():
        np.testing.assert_array_equal(values, second.columns[name])


def test_two_runs_stand_beside_each_other(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, out = tmp_path / "other.h5", tmp_path / "both.html"
    sides = [str(FIXTURES / "llama" / side) for side in ("base", "tuned")]
    assert main(["diff", *sides, "-o", str(other), "-q"]) == 1
    assert main(["report", str(llama), "--against", str(other), "-o", str(out)]) == 0
    page = Page(out.read_text())
    assert page.sections() == [*SECTIONS[:3], "overlap", *SECTIONS[3:]]
    capsys.readouterr()
    assert main(["overlap", str(llama), str(other), "--format", "json", "-q", "-O", str(tmp_path / "o.json")]) == 0
    counted = page.document()["overlap"]["pairs"][0]["global"]
    assert percent(counted["o1"]) in page.said("overlap") and len(page.document()["runs"]) == 2
    assert page.cells["overlap"][-1][0] == "all" and page.cells["overlap"][-1][4] == percent(counted["o1"])
    assert len(page.hints("heatmap of unchanged")) > len(page_of(llama).hints("heatmap of unchanged"))
    names = {row[0] for row in page.cells["tensors"][1:]}
    with RunFile(other) as file:
        assert names == set(file.names)


@pytest.mark.parametrize(
    ("rule", "why"), [("none", "holds no masks"), ("abs:1e-05", "do not start from the same base")]
)
def test_runs_without_an_overlap_say_why(llama: Path, tmp_path: Path, rule: str, why: str) -> None:
    other, out = tmp_path / "other.h5", tmp_path / "both.html"
    pair = "llama" if rule == "none" else "addition"
    sides = [str(FIXTURES / pair / side) for side in ("base", "tuned")]
    assert main(["diff", *sides, "-o", str(other), "--mask", rule, "-q"]) == 1
    assert main(["report", str(llama), "--against", str(other), "-o", str(out), "-q"]) == 0
    assert why in Page(out.read_text()).said("overlap")


def test_letters_stay_with_their_runs(make_run, diff: Diff, tmp_path: Path) -> None:
    bare, whole = make_run(tmp_path / "a.h5", diff), make_run(tmp_path / "b.h5", with_spectra(diff))
    with h5py.File(bare, "r+") as file:
        del file["histograms"]
    page = page_of(bare, whole)
    for section, lacking in (("spectra", "holds no spectra"), ("distributions", "holds no histograms")):
        first, rest = page.said(section).split(lacking)
        assert "A: " in first and "B: " in rest and "A: " not in rest
    assert page_of(whole, whole).sections() == SECTIONS


def test_a_name_may_be_empty(make_run, make_diff, make_facts, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run.h5", make_diff(tensors=[(make_facts("", (8, 4)), 0.5)]))
    for page in (page_of(path), page_of(path, path)):
        assert [row[0] for row in page.cells["tensors"]] == ["tensor", ""]


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*words: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


def test_the_page_lies_beside_the_run_file_by_itself(cli: Call, make_run, diff: Diff, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run.h5", diff)
    code, out, err = cli("report", path)
    assert (code, err) == (0, "") and out.startswith(f"report: {tmp_path}/run.html (")
    assert Page((tmp_path / "run.html").read_text()).sections() == SECTIONS


def test_a_failure_leaves_what_was_there(cli: Call, make_run, diff: Diff, tmp_path: Path) -> None:
    path, page = make_run(tmp_path / "run.h5", diff), tmp_path / "page.html"
    page.write_text("old")
    with h5py.File(path, "r+") as file:
        file.attrs["complete"] = 0
    code, out, err = cli("report", path, "-o", page)
    assert (code, out) == (2, "") and "incomplete" in err
    assert page.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "run.h5"]


def test_inputs_are_not_replaced(cli: Call, make_run, diff: Diff, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run.h5", diff)
    code, _, err = cli("report", path, "-o", path)
    assert code == 2 and "would replace an input" in err
    assert cli("report", "")[0] == cli("report", tmp_path)[0] == 2
    assert cli("report", tmp_path / "nothing.h5")[0] == cli("report", FIXTURES / "cases.py")[0] == 2
