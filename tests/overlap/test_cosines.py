"""Cosines between updates, by NumPy."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from updates import Updates

import ckptdiff
from ckptdiff.errors import CheckpointError, OptionError, PairingError
from ckptdiff.overlap import overlap

FLOATING = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.norm.weight",
    "empty",
]


def cosine(updates: Updates, i: int, j: int, names: list[str]) -> dict[str, float | None]:
    a, b = (
        np.concatenate([(updates.tuned[at][n].astype(float) - updates.base[n].astype(float)).ravel() for n in names])
        for at in (i, j)
    )
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    if not lengths:
        return {"cosine": None, "cosine_null_sd": None}
    return {"cosine": a @ b / lengths, "cosine_null_sd": np.linalg.norm(a * b) / lengths}


def assert_cosines(row: dict[str, object], wanted: dict[str, float | None]) -> None:
    for key, value in wanted.items():
        assert row[key] == (None if value is None else pytest.approx(value, rel=1e-9)), key


def test_every_pair_globally_and_by_group(updates: Updates) -> None:
    found = overlap([updates.run(i) for i in range(3)], values=True)
    for pair in found.pairs:
        i, j = pair.first, pair.second
        assert_cosines(found.overall(pair), cosine(updates, i, j, FLOATING))
        for row in found.grouped(pair, "tensor"):
            if row["name"] != "ids":
                assert_cosines(row, cosine(updates, i, j, [row["name"]]))
        (norm,) = (row for row in found.grouped(pair, "module") if row["module_type"] == "norm")
        assert_cosines(norm, cosine(updates, i, j, ["model.norm.weight"]))
        zero, one = found.grouped(pair, "layer")
        assert_cosines(zero, cosine(updates, i, j, FLOATING[1:3]))
        assert_cosines(one, cosine(updates, i, j, FLOATING[3:4]))
    without = overlap([updates.run(i) for i in range(2)])
    assert "cosine" not in without.overall(without.pairs[0])
    assert found.warnings == ()


def test_random_signs_stay_within_the_null(tmp_path: Path) -> None:
    """The spread of cosines of updates whose signs are tossed is what stands beside a cosine."""
    rng = np.random.default_rng(0)
    base = np.zeros(3000, np.float32)
    one = (rng.standard_normal(3000) * (rng.random(3000) < 0.2)).astype(np.float32)
    two = (rng.standard_normal(3000) * (rng.random(3000) < 0.3)).astype(np.float32)
    runs = []
    for name, values in {"base": base, "one": one, "two": two}.items():
        save_file({"w": values}, tmp_path / f"{name}.safetensors")
    for name in ("one", "two"):
        runs.append(tmp_path / f"{name}.h5")
        sides = tmp_path / "base.safetensors", tmp_path / f"{name}.safetensors"
        ckptdiff.diff(*sides, out=runs[-1], compare="stored")
    found = overlap(runs, values=True)
    spread = found.overall(found.pairs[0])["cosine_null_sd"]
    signs = rng.choice([-1.0, 1.0], (4000, 3000))
    cosines = signs @ (one * two) / np.linalg.norm(one) / np.linalg.norm(two)
    assert spread == pytest.approx(cosines.std(), rel=0.05)


def test_many_runs_are_estimated_from_a_sample(updates: Updates) -> None:
    found = overlap([*[updates.run(0)] * 12, updates.run(2)], values=True)
    assert any("one tile of 8,192 coordinates in 16" in words and "13 runs" in words for words in found.warnings)
    assert found.overall(found.pairs[0])["cosine"] == pytest.approx(1.0)
    row = found.overall(found.pairs[11])
    assert row["cosine"] == pytest.approx(cosine(updates, 0, 2, FLOATING)["cosine"], abs=0.02)


def test_the_command(updates: Updates, invoke: Callable[..., int], capsys: pytest.CaptureFixture) -> None:
    runs = [updates.run(0), updates.run(2)]
    assert invoke("overlap", *runs, "--values", "--no-progress") == 0
    printed = capsys.readouterr().out
    assert "cosine: between the two updates" in printed
    wanted = cosine(updates, 0, 2, FLOATING)
    assert f"{wanted['cosine']:.3g}" in printed and f"{wanted['cosine_null_sd']:.3g}" in printed
    assert invoke("overlap", *runs, "--values", "--format", "json", "--no-progress") == 0
    (pair,) = json.loads(capsys.readouterr().out)["pairs"]
    assert_cosines(pair["global"], wanted)
    assert invoke("overlap", *runs, "--values", "--by", "tensor", "--format", "csv", "--no-progress") == 0
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    for name in FLOATING[:4]:
        assert float(rows[name]["cosine"]) == pytest.approx(cosine(updates, 0, 2, [name])["cosine"])
    assert invoke("overlap", *runs, "--no-progress") == 0
    assert "cosine" not in capsys.readouterr().out


def test_checkpoints_that_have_moved_or_changed(updates: Updates, tmp_path: Path) -> None:
    runs = [updates.run(0), updates.run(1)]
    tuned = [tmp_path / f"moved{i}.safetensors" for i in range(2)]
    for i, path in enumerate(tuned):
        shutil.copyfile(updates.folder / f"tuned{i}.safetensors", path)
    found = overlap(runs, values=True, tuned=tuned)
    assert_cosines(found.overall(found.pairs[0]), cosine(updates, 0, 1, FLOATING))
    with pytest.raises(OptionError, match="not a tuned checkpoint for each run"):
        overlap(runs, values=True, tuned=tuned[:1])
    save_file(updates.tuned[2], tuned[1])
    with pytest.raises(CheckpointError, match="their headers are the same, but other values") as caught:
        overlap(runs, values=True, tuned=tuned)
    assert caught.value.file == str(tuned[1]) and caught.value.tensor in FLOATING
    save_file({"w": np.zeros(3, np.float32)}, tuned[1])
    with pytest.raises(CheckpointError, match="not the tuned checkpoint that the run compared"):
        overlap(runs, values=True, tuned=tuned)


def test_tensors_that_are_put_together_of_pieces(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    gate, up, norm = (rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in ((8, 4), (8, 4), (4,)))
    two, half = ml_dtypes.bfloat16(2), ml_dtypes.bfloat16(0.5)
    split = {"a.mlp.gate_proj.weight": gate, "a.mlp.up_proj.weight": up, "n.weight": norm}
    fused = {"a.mlp.gate_up_proj.weight": np.concatenate([gate * two, up]), "n.weight": norm * two}
    other = {"a.mlp.gate_proj.weight": gate, "a.mlp.up_proj.weight": up * two, "n.weight": norm * half}
    runs = []
    for name, tensors in {"base": split, "fused": fused, "other": other}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        if name != "base":
            runs.append(tmp_path / f"{name}.h5")
            ckptdiff.diff(tmp_path / "base.safetensors", tmp_path / f"{name}.safetensors", out=runs[-1])
    found = overlap(runs, values=True)
    assert found.overall(found.pairs[0])["cosine"] == pytest.approx(-1.0)
    assert "no cosine of 2 tensors" in found.warnings[-1]
    without = tmp_path / "without.h5"
    sides = tmp_path / "base.safetensors", tmp_path / "fused.safetensors"
    ckptdiff.diff(*sides, out=without, exclude=("n.weight",))
    with pytest.raises(PairingError, match="whole stored tensor in all checkpoints"):
        overlap([without, runs[1]], values=True)
