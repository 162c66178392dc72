"""Tensors of which the tuned side lacks pieces: what both sides have is compared, in the shape of the base's tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ckptdiff
from ckptdiff import RunFile
from ckptdiff.cli import main
from ckptdiff.errors import OptionError
from ckptdiff.exports import export_patch, export_shira
from ckptdiff.options import MaskRule, Options
from ckptdiff.overlap import combine_masks, overlap
from ckptdiff.report.as_json import document
from ckptdiff.run.engine import run
from ckptdiff.run.tasks import Grain
from ckptdiff.track import track

BF16 = ml_dtypes.bfloat16
INSIDE = "model.layers.0.mlp.experts"
NORM = "model.norm.weight"
Tensors = dict[str, np.ndarray]


def fused(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return np.concatenate([gate, up], 1)


def llama4(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(fused(gate, up).swapaxes(1, 2))


def inkling(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return np.stack([gate, up], 2).reshape(len(gate), -1, gate.shape[2])


LAYOUTS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "gate_up_proj": fused,
    "gate_up_proj ": llama4,
    "w13_weight": inkling,
}
GONE = {"1.up_proj", "2.gate_proj", "2.up_proj"}


class Sides:
    """A tensor of fused experts, and these one by one, of which some are missing, with the two sides' own values."""

    def __init__(self, folder: Path, layout: str, shape: tuple[int, int, int], dtype: Any = BF16) -> None:
        rng = np.random.default_rng(0)
        self.name, self.folder = f"{INSIDE}.{layout.strip()}", folder
        base = [(0.02 * rng.standard_normal(shape)).astype(dtype) for _ in range(2)]
        moved = [one + (1e-3 * rng.standard_normal(shape) * (rng.random(shape) < 0.2)).astype(dtype) for one in base]
        self.tuned = {
            f"{expert}.{part}": array[expert]
            for part, array in zip(("gate_proj", "up_proj"), moved, strict=True)
            for expert in range(shape[0])
            if f"{expert}.{part}" not in GONE
        }
        known = [np.ones(shape, bool), np.ones(shape, bool)]
        for name in GONE:
            known["up" in name][int(name[0])] = False
        make = LAYOUTS[layout]
        self.whole, self.other, self.known = make(*base), make(*moved), make(*known)
        down = rng.standard_normal((shape[0], shape[2], shape[1])).astype(dtype)  # tells which way axes go
        self.beside = {f"{INSIDE}.{'w2_weight' if 'w13' in layout else 'down_proj'}": down, NORM: np.ones(5, dtype)}
        if make is llama4:
            self.beside[f"{INSIDE}.down_proj"] = np.ascontiguousarray(down.swapaxes(1, 2))
        singles = {f"{INSIDE}.{name}.weight": array for name, array in self.tuned.items()}
        singles |= {f"{INSIDE}.{expert}.down_proj.weight": one for expert, one in enumerate(down)}
        self.base_path = save(folder / "base", {self.name: self.whole, **self.beside})
        self.tuned_path = save(folder / "tuned", {NORM: np.ones(5, dtype), **singles})
        self.all_path = save(folder / "all", {self.name: self.other, **self.beside})

    @property
    def changed(self) -> np.ndarray:
        """Which coordinates differ, of those that both sides have."""
        return (self.whole != self.other) & self.known


def save(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(params=LAYOUTS)
def sides(request: pytest.FixtureRequest, tmp_path: Path) -> Sides:
    return Sides(tmp_path, request.param, (4, 12, 20))


def row_of(diff: ckptdiff.Diff, name: str) -> dict[str, Any]:
    (found,) = (row for row in document(diff)["tensors"] if row["name"] == name)
    return found


def alone(sides: Sides, folder: Path, **options: Any) -> ckptdiff.Diff:
    """The same elements as a tensor of their own on either side."""
    pair = [save(folder / side, {"w": one[sides.known]}) for side, one in (("a", sides.whole), ("b", sides.other))]
    return ckptdiff.diff(*pair, **options)


def assert_part(diff: ckptdiff.Diff, sides: Sides, folder: Path, **options: Any) -> None:
    """Figures are those of the elements that both sides have, and the rest is counted as only in base."""
    found, (expected,) = row_of(diff, sides.name), document(alone(sides, folder, **options))["tensors"]
    assert found["shape"] == list(sides.whole.shape) and found["numel"] == sides.known.sum()
    about = {"name", "shape", "pieces", "tuned_name", "delta_share", "module_type", "block", "layer", "tower"}
    for key in expected.keys() - about:
        assert found[key] == expected[key], key
    lacking = int((~sides.known).sum())
    base, tuned = diff.coverage["base"], diff.coverage["tuned"]
    assert base.compared == base.values - lacking == tuned.compared == tuned.values
    (left,) = diff.base["left_out"]
    assert (left["pattern"], left["values"]) == (sides.name, lacking) and left["why"].endswith("only in base")
    assert not diff.only_in_base and not diff.only_in_tuned and not diff.mismatched and not diff.identical


def test_what_both_sides_have_is_compared(sides: Sides, tmp_path: Path) -> None:
    diff = ckptdiff.diff(sides.base_path, sides.tuned_path, out=tmp_path / "run.h5", mask="bitwise")
    assert_part(diff, sides, tmp_path, mask="bitwise")
    assert any("in part only, as tuned has no" in text and sides.name in text for text in diff.warnings)
    names = {piece["tuned_name"] for piece in row_of(diff, sides.name)["pieces"]}
    assert names == {f"{INSIDE}.{name}.weight" for name in sides.tuned}
    with RunFile(tmp_path / "run.h5") as file:
        assert file.load().tensors == diff.tensors
        mask = file.masks[sides.name]
        np.testing.assert_array_equal(mask.dense(), sides.changed)
        assert mask.count == sides.changed.sum()


@pytest.mark.parametrize("rule", ["top:3", "rel:0.05", "abs:1e-4", "eta:0.01"])
def test_masks_by_every_rule(sides: Sides, rule: str, tmp_path: Path) -> None:
    ckptdiff.diff(sides.base_path, sides.tuned_path, out=tmp_path / "run.h5", mask=rule)
    alone(sides, tmp_path, out=tmp_path / "alone.h5", mask=rule)
    with RunFile(tmp_path / "run.h5") as file, RunFile(tmp_path / "alone.h5") as other:
        found, expected = file.masks[sides.name].dense(), other.masks["w"].dense()
    np.testing.assert_array_equal(found[sides.known], expected)
    assert not found[~sides.known].any() and expected.any()


@pytest.mark.parametrize("layout", [pytest.param(one, id=one.strip() + "_" * one.count(" ")) for one in LAYOUTS])
def test_parts_of_several_blocks(layout: str, tmp_path: Path) -> None:
    sides = Sides(tmp_path, layout, (4, 500, 700))
    assert sides.known.sum() > 1.5 * 2**20
    files = []
    for number, (threads, grain) in enumerate([(1, Grain()), (3, Grain(blocks=1))]):
        path = tmp_path / f"{number}.h5"
        options = Options(threads=threads, mask=MaskRule("bitwise"))
        run(str(sides.base_path), str(sides.tuned_path), out=path, options=options, grain=grain)
        with RunFile(path) as file:
            diff = file.load()
            np.testing.assert_array_equal(file.masks[sides.name].dense(), sides.changed)
        files.append(diff.per_tensor)
    assert files[0] == files[1]
    assert_part(diff, sides, tmp_path, mask="bitwise")


def test_values_stored_wider(tmp_path: Path) -> None:
    sides = Sides(tmp_path, "gate_up_proj", (4, 12, 20), np.float32)
    for compare in ("bf16", "stored"):
        diff = ckptdiff.diff(sides.base_path, sides.tuned_path, compare=compare)
        assert_part(diff, sides, tmp_path / compare, compare=compare)


def test_an_expert_of_another_shape_is_only_in_tuned(sides: Sides, tmp_path: Path) -> None:
    """Each side counts it: the base its own rows, the tuned side the whole of it."""
    other = f"{INSIDE}.1.up_proj.weight"
    tensors = load_file(sides.tuned_path / "model.safetensors") | {other: np.ones((11, 20), BF16)}
    diff = ckptdiff.diff(sides.base_path, save(tmp_path / "odd", tensors))
    assert diff.only_in_tuned == (other,) and not diff.only_in_base
    assert row_of(diff, sides.name)["numel"] == sides.known.sum()
    assert diff.coverage["tuned"].values - diff.coverage["tuned"].compared == 11 * 20
    assert any("1.up_proj.weight has shape (11, 20), where (12, 20) is right" in text for text in diff.warnings)


def test_codes_with_scales(tmp_path: Path) -> None:
    """Fused experts in fp8 with a scale for each block, against bfloat16 ones, of which some are missing."""
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((3, 256, 128)).astype(ml_dtypes.float8_e4m3fn)
    scales = (1 + rng.random((3, 2, 1))).astype(np.float32)
    values = codes.astype(np.float32) * scales.repeat(128, 1)
    name, down = f"{INSIDE}.gate_up_proj", rng.standard_normal((3, 128, 128)).astype(BF16)
    base = save(tmp_path / "base", {name: codes, f"{name}_scale_inv": scales, f"{INSIDE}.down_proj": down})
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (base / "config.json").write_text(json.dumps(config))
    singles = {f"{INSIDE}.{expert}.down_proj.weight": one for expert, one in enumerate(down)}
    for expert, whole in enumerate(values.astype(BF16)):
        for part, half in zip(("gate", "up"), np.split(whole, 2), strict=True):
            singles[f"{INSIDE}.{expert}.{part}_proj.weight"] = half
    del singles[f"{INSIDE}.1.gate_proj.weight"]
    singles[f"{INSIDE}.2.up_proj.weight"] = -singles[f"{INSIDE}.2.up_proj.weight"]
    diff = ckptdiff.diff(base, save(tmp_path / "tuned", singles), out=tmp_path / "run.h5", mask="bitwise")
    expected = np.zeros(values.shape, bool)
    expected[2, 128:] = values.astype(BF16)[2, 128:] != 0
    row = row_of(diff, name)
    assert row["numel"] == 5 * 128 * 128 and row["dtype_base"] == "FP8"
    with RunFile(tmp_path / "run.h5") as file:
        np.testing.assert_array_equal(file.masks[name].dense(), expected)


def test_what_the_command_line_says(sides: Sides, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(sides.base_path), str(sides.tuned_path), "-q"]) == 1
    capsys.readouterr()
    assert main(["diff", str(sides.base_path), str(sides.tuned_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"rows, or a part, that are only in base: {sides.name} (1 tensor, " in out
    assert "in part only, as tuned has no" in out
    # Equal as far as it goes is not identical.
    assert main(["diff", str(sides.all_path), str(sides.tuned_path), "-q"]) == 1


def test_overlap_counts_the_part(sides: Sides, tmp_path: Path) -> None:
    """Chance is that of the elements that are compared, by magnitude too."""
    rng = np.random.default_rng(1)
    again = {
        name: (one.astype(np.float32) * (1 + 0.1 * (rng.random(one.shape) < 0.3))).astype(BF16)
        for name, one in sides.tuned.items()
    }
    tuned = save(tmp_path / "again", {f"{INSIDE}.{name}.weight": one for name, one in again.items()})
    found = []
    for folder, pair in (("run", (sides.tuned_path, tuned)), ("all", (sides.all_path,))):
        for number, other in enumerate(pair):
            path = tmp_path / f"{folder}{number}.h5"
            ckptdiff.diff(sides.base_path, other, out=path, mask="bitwise", include=["*.gate_up_proj", "*.w13_weight"])
            found.append(path)
    for base in (None, sides.base_path):
        both = overlap(found[:2], base=base)
        (pair,) = both.pairs
        row = both.overall(pair)
        with RunFile(found[0]) as one, RunFile(found[1]) as two:
            masks = [run.masks[sides.name].dense() for run in (one, two)]
        assert row["numel"] == sides.known.sum() and row["masked_both"] == (masks[0] & masks[1]).sum()
        independent = masks[0].sum() * masks[1].sum() / sides.known.sum()
        assert row["o1_independent"] == pytest.approx(independent / masks[0].sum())
        magnitudes = np.abs(sides.whole.astype(np.float64))[sides.known]
        bins = np.unique(np.floor(np.log2(magnitudes)) if base is None else magnitudes, return_inverse=True)[1]
        counts = [np.bincount(bins, weights=mask[sides.known]) for mask in masks]
        expected = (counts[0] * counts[1] / np.bincount(bins)).sum()
        assert row["o1_conditional"] == pytest.approx(expected / masks[0].sum())
    # The norm of a part says nothing of the whole.
    assert not overlap([found[0], found[2]]).warnings
    assert combine_masks("union", found[:2], tmp_path / "union.h5").columns["changed"][0] == (masks[0] | masks[1]).sum()


def test_what_needs_whole_tensors_says_why_not(sides: Sides, tmp_path: Path) -> None:
    ckptdiff.diff(sides.base_path, sides.tuned_path, out=tmp_path / "run.h5", mask="bitwise")
    with RunFile(tmp_path / "run.h5") as file:
        with pytest.raises(OptionError, match="stored in another way") as caught:
            export_patch(file, tmp_path / "p.safetensors")
        assert caught.value.tensor == sides.name
        with pytest.raises(OptionError):
            export_shira(file, tmp_path / "shira", rank=1)
    found = track(sides.base_path, [sides.tuned_path])
    assert sides.name not in found.names
    assert any("only whole stored tensors are followed" in text and sides.name in text for text in found.warnings)
