"""The page of a track file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from read_page import Page

from ckptdiff.cli import main
from ckptdiff.page.track_page import track_page
from ckptdiff.report.text import percent
from ckptdiff.track import Track, load_track, save_track

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
