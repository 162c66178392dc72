"""The page of a track file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from read_page import Page

from ckptdiff.cli import main
from ckptdiff.page.track_page import track_page
from ckptdiff.report.text import percent
from ckptdiff.track import Track, load_track, save_track
from ckptdiff.track.geometry import step_cosines
from ckptdiff.track.subspaces import LOCKING_FIGURES, Locking

SHAPES = {
    "model.embed_tokens.weight": (64, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.layers.1.mlp.up_proj.weight": (16, 8),
}


def made(steps: int, layers: int = 2) -> Track:
    shapes = {**SHAPES, **{f"model.layers.{at}.mlp.up_proj.weight": (16, 8) for at in range(layers)}}
    sizes = np.array([a * b for a, b in shapes.values()])
    support = np.array([sizes * (step + 1) // 10 for step in range(steps)])
    touched = np.diff(support, axis=0, prepend=0)
    counts = {"support": support, "touched": touched, "reverted": 0 * support, "churned": support // 2}
    return Track(
        base="runs/base",
        steps=tuple(f"runs/checkpoint-{step}" for step in range(steps)),
        compare="bf16",
        names=tuple(shapes),
        shapes=tuple(shapes.values()),
        counts=counts,
        base_norms=np.sqrt(sizes),
        delta_norms=np.array([0.01 * (step + 1) * np.sqrt(sizes) for step in range(steps)]),
        warnings=("<b>bold</b>",),
    )


def test_the_page_of_a_track(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "track.h5", tmp_path / "page.html"
    save_track(made(3), path)
    assert main(["report", str(path), "-o", str(out)]) == 0
    page = Page(out.read_text())
    expected = ["coverage", "provenance", "headline", "growth", "heatmap", "distributions", "spectra", "tensors"]
    assert page.sections() == expected
    assert "Warning: <b>bold</b>" in page.said("coverage") and "b" not in [tag for tag, a in page.elements if "id" in a]
    track = load_track(path)
    assert page.document() == track.as_json()
    rows = page.cells["headline"][1:]
    assert [row[1] for row in rows] == [percent(row["support_fraction"]) for row in track.overall()]
    hints = page.hints("heatmap of support")
    (last,) = (rows[-1] for label, rows in track.grouped("layer") if label["layer"] == 1)
    assert f"up_proj, layer 1: {percent(last['support_fraction'])}" in hints
    assert len(page.hints("Support and union")) == 8 and len(page.hints("What moved in each step")) == 6
    assert page.said("distributions").endswith("ckptdiff diff measures them for a pair.")
    assert page.said("spectra").endswith("ckptdiff track --spectra measures them.")


def with_directions(steps: int) -> Track:
    """The same with products of random paths, and with overlaps of matrices."""
    track, rng = made(steps), np.random.default_rng(0)
    paths = np.cumsum(rng.standard_normal((len(track.names), steps, 40)), axis=1)
    rows, columns = np.tril_indices(steps)
    products = np.einsum("tik,tjk->tij", paths, paths)[:, rows, columns]
    overlaps = rng.random((len(LOCKING_FIGURES), len(track.names), steps * (steps - 1) // 2))
    return replace(track, products=products, locking=Locking(*overlaps))


def test_which_way_the_update_went() -> None:
    track = with_directions(5)
    page = Page("".join(track_page(track, "track.h5")))
    assert page.sections()[3:6] == ["growth", "direction", "heatmap"]
    last, cosines = track.overall()[-1], step_cosines(track.gram())
    said = page.said("direction")
    for key in ("rank1_share", "rank1_share_null", "line_r2", "line_r2_null"):
        assert percent(last[key]) in said
    hints = page.hints("Cosines between steps")
    assert len(hints) == 25 and f"steps 2 and 5: {cosines[1, 4]:.3g}" in hints
    assert len(page.hints("How straight the path is")) == 4 * 4 and len(page.hints("Length of each step")) == 5
    said = page.said("spectra")
    assert all(percent(last[key]) in said for key in LOCKING_FIGURES)
    overlap = track.locking.matrix("left_overlap", range(len(track.names)), 5)[3, 1]
    assert f"steps 4 and 2: {overlap:.3g}" in page.hints("Left subspaces")
    (rows,) = (rows for label, rows in track.grouped("layer") if label["layer"] == 1)
    assert f"up_proj, layer 1: {percent(rows[-1]['line_r2'])}" in page.hints("heatmap of line")
    assert "--gram --spectra" in page.said("provenance")
    assert page.document() == track.as_json()


def test_steps_that_moved_nothing_have_no_direction() -> None:
    track = with_directions(3)
    still = replace(track, products=0 * track.products, locking=Locking(*np.full((4, len(track.names), 3), np.nan)))
    page = Page("".join(track_page(still, "track.h5")))
    assert "No two steps in a row moved anything" in page.said("direction")
    assert "n/a" in page.said("direction") and "Left out: no matrix has an update" in page.said("spectra")
    assert {hint.split(": ")[1] for hint in page.hints("Cosines between steps")} == {"n/a"}
    one = Page("".join(track_page(with_directions(1), "track.h5")))
    assert "Left out: a track of one step has no other" in one.said("direction")


def test_one_step_does_not_grow() -> None:
    page = Page("".join(track_page(made(1), "track.h5")))
    assert "Left out: a track of one step" in page.said("growth")
    assert len(page.pictures()) == 3


def test_many_tensors_share_rows() -> None:
    page = Page("".join(track_page(made(2, layers=1200), "track.h5")))
    assert "tensors" not in page.document() and len(page.source) < 1_500_000
    rows = page.cells["tensors"][1:]
    assert sum(int(row[2]) for row in rows) == 1201 and len(rows) < 100


def test_a_track_has_nothing_against_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_track(made(2), tmp_path / "track.h5")
    assert main(["report", str(tmp_path / "track.h5"), "--against", str(tmp_path / "track.h5")]) == 2
    assert "--against is for run files" in capsys.readouterr().err
