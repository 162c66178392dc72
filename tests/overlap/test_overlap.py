"""Overlaps against sets of coordinates, and their baselines against the formulas, by NumPy."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from updates import Updates

import ckptdiff
from ckptdiff.errors import CheckpointError, MaskError, OptionError, RunFileError
from ckptdiff.overlap import overlap

FLOATING = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.norm.weight",
    "empty",
]


def shares(one: float, two: float, both: float) -> tuple[float, float, float]:
    return both / one, both / two, both / (one + two - both)


def by_octaves(base: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Expected intersection if masks meet by chance among weights of one floor(log2 |W0|)."""
    with np.errstate(divide="ignore"):
        octave = np.floor(np.log2(np.abs(base.astype(np.float64))))
    return sum(a[octave == o].sum() * b[octave == o].sum() / (octave == o).sum() for o in np.unique(octave))


def by_codes(base: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """The same for weights of one magnitude."""
    magnitude = np.abs(base.astype(np.float32))
    values, codes = np.unique(magnitude, return_inverse=True)
    codes = codes.reshape(base.shape)
    n, x, y = (np.bincount(codes[chosen], minlength=values.size) for chosen in (np.ones_like(a), a, b))
    return (x * y / n).sum()


def expected(
    updates: Updates, i: int, j: int, names: list[str], expect: Callable, eps: float = 0.0
) -> dict[str, float]:
    a, b = updates.masks(i, eps), updates.masks(j, eps)
    one, two = (sum(int(masks[name].sum()) for name in names) for masks in (a, b))
    both = sum(int((a[name] & b[name]).sum()) for name in names)
    numel = sum(a[name].size for name in names)
    stratified = sum(a[n].sum() * b[n].sum() / a[n].size for n in names if a[n].size)
    conditional = sum(expect(updates.base[n], a[n], b[n]) for n in names if a[n].size)
    row: dict[str, float] = {"numel": numel, "masked_1": one, "masked_2": two, "masked_both": both}
    for suffix, shared in (
        ("", both),
        ("_independent", one * two / numel),
        ("_stratified", stratified),
        ("_conditional", conditional),
    ):
        for key, share in zip(("o1", "o2", "jaccard"), shares(one, two, shared), strict=True):
            row[key + suffix] = share
        row["zero_jaccard" + suffix] = shares(numel - one, numel - two, numel - one - two + shared)[2]
    left_out = sum(int((~a[name] & ~b[name]).sum()) for name in names)
    assert row["zero_jaccard"] == left_out / sum(int((~a[name] | ~b[name]).sum()) for name in names)
    return row


def test_every_pair_beside_its_baselines(updates: Updates) -> None:
    found = overlap([updates.run(i) for i in range(3)])
    assert [(pair.first, pair.second) for pair in found.pairs] == [(0, 1), (0, 2), (1, 2)]
    for pair in found.pairs:
        wanted = expected(updates, pair.first, pair.second, FLOATING, by_octaves)
        assert found.overall(pair) == pytest.approx(wanted, rel=1e-12)
    assert found.warnings == ()


def test_groups_hold_their_floating_tensors(updates: Updates) -> None:
    found = overlap([updates.run(1), updates.run(2)])
    (pair,) = found.pairs
    modules = {row.pop("module_type"): row for row in found.grouped(pair, "module")}
    assert modules.keys() == {"embed_tokens", "q_proj", "up_proj", "norm", "other"}
    up = [name for name in FLOATING if "up_proj" in name]
    assert modules["up_proj"] == pytest.approx({"tensors": 2, **expected(updates, 1, 2, up, by_octaves)}, rel=1e-12)
    layers = found.grouped(pair, "layer")
    assert [(row["tower"], row["layer"], row["tensors"]) for row in layers] == [("language", 0, 2), ("language", 1, 1)]
    assert {row["block"] for row in found.grouped(pair, "block")} == {"embedding", "attention", "ffn", "norm", "other"}
    tensors = {row["name"]: row for row in found.grouped(pair, "tensor")}
    assert tensors["ids"]["o1"] == 0  # an integer tensor stands alone, and in no group
    assert tensors["ids"]["o1_conditional"] is None
    assert tensors["empty"]["jaccard"] is None


def test_the_groups_of_the_first_run_and_towers(
    updates: Updates, tmp_path: Path, invoke: Callable, capsys: pytest.CaptureFixture
) -> None:
    paths = [updates.folder / f"{name}.safetensors" for name in ("base", "tuned1")]
    first = tmp_path / "grouped.h5"
    ckptdiff.diff(*paths, out=first, mask="bitwise", groups=(r"mlp=\.mlp\.", r"early=layers\.0\.|ids"))
    found = overlap([first, updates.run(2)])
    (pair,) = found.pairs
    groups = {row.pop("group"): row for row in found.grouped(pair, "group")}
    assert groups.keys() == {"early", "mlp"}
    members = {
        "early": [name for name in FLOATING if "layers.0." in name],
        "mlp": [n for n in FLOATING if ".mlp." in n],
    }
    for group, names in members.items():
        wanted = {"tensors": len(names), **expected(updates, 1, 2, names, by_octaves)}
        assert groups[group] == pytest.approx(wanted, rel=1e-12)
    (tower,) = found.grouped(pair, "tower")
    wanted = {"tensors": len(FLOATING), **expected(updates, 1, 2, FLOATING, by_octaves)}
    assert (tower.pop("tower"), tower) == ("language", pytest.approx(wanted, rel=1e-12))

    assert invoke("overlap", first, updates.run(2), "--format", "csv", "--by", "group") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["group"]: float(row["o1"]) for row in rows} == {name: row["o1"] for name, row in groups.items()}
    assert invoke("overlap", first, updates.run(2), "--format", "json") == 0
    assert len(json.loads(capsys.readouterr().out)["pairs"][0]["groups"]) == 2
    assert invoke("overlap", first, updates.run(2), "--by", "tower") == 0
    assert "language" in capsys.readouterr().out
    assert invoke("overlap", updates.run(2), first, "--by", "group") == 0
    assert "The first run has no groups" in capsys.readouterr().out


def test_an_empty_mask_has_no_overlap_to_speak_of(updates: Updates) -> None:
    found = overlap([updates.run(0), updates.run(1)])
    row = next(row for row in found.grouped(found.pairs[0], "module") if row["module_type"] == "norm")
    assert row["masked_1"] == 0 < row["masked_2"]
    assert all(row[key] is None for key in row if key.startswith(("o1", "o2", "jaccard")))
    # All that the second mask leaves out the first does too.
    assert row["zero_jaccard"] == row["zero_jaccard_independent"] == (row["numel"] - row["masked_2"]) / row["numel"]


def test_masks_of_other_rules_need_the_base_for_the_conditional_baseline(updates: Updates, tmp_path: Path) -> None:
    runs = [updates.run(i, "abs:1e-05") for i in (1, 2)]
    found = overlap(runs)
    assert found.overall(found.pairs[0])["o1_conditional"] is None
    with_base = overlap(runs, base=updates.folder / "base.safetensors")
    wanted = expected(updates, 1, 2, FLOATING, by_codes, eps=1e-5)
    assert with_base.overall(with_base.pairs[0]) == pytest.approx(wanted, rel=1e-12)
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not the base"):
        overlap(runs, base=tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("dtype", "compare"), [("bf16", "bf16"), ("f32", "bf16"), ("f32", "stored"), ("f64", "stored")]
)
def test_another_base_with_the_same_headers_is_refused(dtype: str, compare: str, tmp_path: Path) -> None:
    real = {"bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64}[dtype]
    rng = np.random.default_rng(1)
    for name in ("base", "other", "one", "two"):
        values = np.random.default_rng(5 if name == "other" else 4).standard_normal((40, 50))
        moved = values + 0.1 * (rng.random(values.shape) < 0.2) if name in ("one", "two") else values
        odd = np.array([1.0, np.nan, 2.0]) * (2 if name == "other" else 1)  # its norm is not known
        save_file({"w.weight": moved.astype(real), "odd": odd.astype(real)}, tmp_path / f"{name}.safetensors")
    runs = [tmp_path / f"{name}.h5" for name in ("one", "two")]
    for run in runs:
        tuned = run.with_suffix(".safetensors")
        ckptdiff.diff(tmp_path / "base.safetensors", tuned, out=run, compare=compare, mask="abs:1e-05")
    found = overlap(runs, base=tmp_path / "base.safetensors")
    assert found.overall(found.pairs[0])["o1_conditional"] is not None
    with pytest.raises(CheckpointError, match="not the base") as caught:
        overlap(runs, base=tmp_path / "other.safetensors")
    assert caught.value.tensor == "w.weight"


@pytest.mark.parametrize("runs_compare", [("bf16", "stored"), ("stored", "bf16"), ("bf16", "bf16")])
def test_a_base_that_is_cast_is_known_by_its_files_and_values(runs_compare: tuple[str, str], tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((60, 50)).astype(np.float32)
    weights[0] = 1.4e-40  # casts move subnormal values by a part of any size
    weights[1, 0] = 3e-39
    later = weights.copy()
    later[5] *= np.float32(1.01)
    for name, values in ("base", weights), ("tuned", weights * 1.5), ("later", later):
        save_file({"w": values.astype(np.float32)}, tmp_path / f"{name}.safetensors")
    os.utime(tmp_path / "later.safetensors", ns=(0, 0))  # the clock of files may not have ticked
    shutil.copy2(tmp_path / "base.safetensors", tmp_path / "copy.safetensors")
    runs = {}
    for base in ("base", "copy", "later"):
        for compare in runs_compare:
            runs[base, compare] = tmp_path / f"{base}-{compare}.h5"
            files = tmp_path / f"{base}.safetensors", tmp_path / "tuned.safetensors"
            ckptdiff.diff(*files, out=runs[base, compare], compare=compare, mask="abs:1e-05")
    first, second = runs_compare
    for other in ("base", "copy"):
        found = overlap([runs["base", first], runs[other, second]], base=tmp_path / "base.safetensors")
        assert found.overall(found.pairs[0])["o1_conditional"] is not None
    with pytest.raises(MaskError, match="same") as caught:
        overlap([runs["base", first], runs["later", second]])
    assert caught.value.tensor == "w" and "--force" in str(caught.value.hint)
    with pytest.raises(CheckpointError, match="not the base") as refused:
        overlap([runs["base", first], runs["base", second]], base=tmp_path / "later.safetensors")
    assert refused.value.tensor == "w"


def test_a_base_that_each_cast_keeps_is_known_by_its_norms(tmp_path: Path) -> None:
    base = np.random.default_rng(3).standard_normal((40, 30)).astype(ml_dtypes.bfloat16)
    later = base.copy()
    later[3] *= 2
    runs = {}
    for name, values in (("base", base), ("copy", base), ("later", later)):
        save_file({"w": values}, tmp_path / f"{name}.safetensors")
        os.utime(tmp_path / f"{name}.safetensors", ns=(len(runs), len(runs)))
        for dtype in (np.float32, ml_dtypes.bfloat16):
            run = runs[name, dtype] = tmp_path / f"{name}-{np.dtype(dtype)}.h5"
            save_file({"w": (values * 1.5).astype(dtype)}, tmp_path / "tuned.safetensors")
            ckptdiff.diff(tmp_path / f"{name}.safetensors", tmp_path / "tuned.safetensors", out=run, compare="stored")
    one, other = (runs["base", np.float32], runs["copy", ml_dtypes.bfloat16])
    assert {ckptdiff.RunFile(run).load().tensors[0].compare for run in (one, other)} == {"f32", "bf16"}
    overlap([one, other])
    with pytest.raises(MaskError, match="same base"):
        overlap([one, runs["later", ml_dtypes.bfloat16]])


def test_different_rules_are_said(updates: Updates) -> None:
    found = overlap([updates.run(0), updates.run(1, "top:20")])
    assert "by top:20 (compared as bf16)" in found.warnings[0]


def test_other_bases_are_refused_unless_forced(updates: Updates, tmp_path: Path) -> None:
    ckptdiff.diff(
        updates.folder / "tuned0.safetensors",
        updates.folder / "tuned1.safetensors",
        out=tmp_path / "run.h5",
        mask="bitwise",
    )
    runs = [updates.run(0), tmp_path / "run.h5"]
    with pytest.raises(MaskError, match="same base") as caught:
        overlap(runs)
    assert caught.value.tensor in FLOATING
    forced = overlap(runs, force=True)
    assert "another base" in forced.warnings[0]


def test_a_run_that_broke_down_still_has_its_base(updates: Updates, tmp_path: Path) -> None:
    tensors = load_file(updates.folder / "tuned1.safetensors")
    tensors["model.embed_tokens.weight"][0, :3] = np.nan
    save_file(tensors, tmp_path / "broken.safetensors")
    ckptdiff.diff(
        updates.folder / "base.safetensors", tmp_path / "broken.safetensors", out=tmp_path / "run.h5", mask="bitwise"
    )
    assert overlap([updates.run(0), tmp_path / "run.h5"]).warnings == ()


def test_tensors_that_one_run_lacks_are_left_out(updates: Updates, tmp_path: Path) -> None:
    ckptdiff.diff(
        updates.folder / "base.safetensors",
        updates.folder / "tuned1.safetensors",
        out=tmp_path / "run.h5",
        mask="bitwise",
        include=("*.mlp.*", "ids"),
    )
    found = overlap([updates.run(0), tmp_path / "run.h5"])
    assert {facts.name for facts in found.tensors} == {name for name in FLOATING if ".mlp." in name} | {"ids"}
    assert "4 tensors not in all runs, left out: " in found.warnings[0]


def test_shapes_that_differ_and_runs_without_a_common_tensor(updates: Updates, tmp_path: Path) -> None:
    tensors = load_file(updates.folder / "base.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].T.copy()
    save_file(tensors, tmp_path / "other.safetensors")
    ckptdiff.diff(tmp_path / "other.safetensors", tmp_path / "other.safetensors", out=tmp_path / "shape.h5")
    with pytest.raises(MaskError, match="different shapes"):
        overlap([updates.run(0), tmp_path / "shape.h5"])
    save_file({"alone": np.ones(3, np.float32)}, tmp_path / "alone.safetensors")
    ckptdiff.diff(tmp_path / "alone.safetensors", tmp_path / "alone.safetensors", out=tmp_path / "alone.h5")
    with pytest.raises(MaskError, match="no tensor in common"):
        overlap([updates.run(0), tmp_path / "alone.h5"])


def test_runs_that_say_nothing_are_refused(updates: Updates, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="two run files"):
        overlap([updates.run(0)])
    with pytest.raises(RunFileError, match="holds no masks"):
        overlap([updates.run(0), updates.run(1, "none")])
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(RunFileError, match="not a ckptdiff run file"):
        overlap([updates.run(0), tmp_path / "text.h5"])


def test_the_command_prints_each_format(updates: Updates, invoke: Callable, capsys: pytest.CaptureFixture) -> None:
    runs = [updates.run(i) for i in range(3)]
    assert invoke("overlap", *runs, "--format", "json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "ckptdiff.overlap/1"
    assert [run["mask_rule"] for run in document["runs"]] == ["bitwise"] * 3
    assert set(document["pairs"][2]) == {
        *("first", "second", "global", "modules", "layers", "layer_modules", "blocks", "towers", "tensors")
    }
    assert document["pairs"][2]["global"] == pytest.approx(expected(updates, 1, 2, FLOATING, by_octaves), rel=1e-12)

    assert invoke("overlap", *runs, "--format", "csv", "--by", "layer") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["first"], row["layer"]) for row in rows[:3]] == [
        (str(runs[0]), "0"),
        (str(runs[0]), "1"),
        (str(runs[0]), "0"),
    ]
    assert float(rows[5]["o1"]) == pytest.approx(document["pairs"][2]["layers"][1]["o1"])

    assert invoke("overlap", runs[0], runs[1], "--by", "layer,module") == 0
    assert "0 q_proj" in capsys.readouterr().out
    assert invoke("overlap", runs[0], runs[1]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[1].split()[:1] == ["block"]
    assert any(line.startswith("all ") for line in table.splitlines())
    assert "--base PATH" not in table and "by size: independent" in table

    assert invoke("overlap", runs[0], updates.run(1, "top:20")) == 0
    printed = capsys.readouterr()
    assert "--base PATH has to name the base" in printed.out and "by size: independent" not in printed.out
    assert "top:20" in printed.err
    assert invoke("overlap", runs[0]) == 2
