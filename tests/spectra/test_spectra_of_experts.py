"""Spectra and factors of experts, one by one or in one tensor, and of quantised weights: those of their values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ckptdiff
from ckptdiff import RunFile
from ckptdiff.errors import RunFileError
from ckptdiff.lora import extract_lora
from ckptdiff.spectra import add_spectra

pytestmark = pytest.mark.usefixtures("each_library")

BF16 = ml_dtypes.bfloat16
EXPERTS, INNER, HIDDEN = 3, 24, 40
INSIDE = "model.layers.0.mlp.experts"
ATTENTION = "model.layers.0.self_attn.q_proj.weight"
Tensors = dict[str, np.ndarray]


def split(parts: Tensors) -> Tensors:
    return {f"{INSIDE}.{expert}.{name}.weight": array for name in PARTS for expert, array in enumerate(parts[name])} | {
        ATTENTION: parts["q"]
    }


def fused(parts: Tensors) -> Tensors:
    gate_up = np.concatenate([parts["gate_proj"], parts["up_proj"]], 1)
    return {f"{INSIDE}.gate_up_proj": gate_up, f"{INSIDE}.down_proj": parts["down_proj"], ATTENTION: parts["q"]}


def transposed(parts: Tensors) -> Tensors:
    return {
        name: np.ascontiguousarray(array.swapaxes(1, 2)) if ".experts." in name else array
        for name, array in fused(parts).items()
    }


PARTS = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
FORMS = {"split": split, "fused": fused, "transposed": transposed}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with an update of low rank and noise, in every form; one expert's down_proj has none."""
    folder, rng = tmp_path_factory.mktemp("experts"), np.random.default_rng(0)
    base, tuned = {}, {}
    for name, shape in {**{part: (EXPERTS, *shape) for part, shape in PARTS.items()}, "q": (32, HIDDEN)}.items():
        base[name] = (0.02 * rng.standard_normal(shape)).astype(BF16)
        lead = rng.standard_normal((*shape[:-1], 1)) * rng.standard_normal((*shape[:-2], 1, shape[-1]))
        tuned[name] = (base[name].astype(np.float32) + 1e-3 * (lead + rng.standard_normal(shape))).astype(BF16)
    tuned["down_proj"][1] = base["down_proj"][1]
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    for form, make in FORMS.items():
        save_file(make(base), folder / f"base_{form}.safetensors")
        save_file(make(tuned), folder / f"tuned_{form}.safetensors")
    return folder


def compared(folder: Path, base: str, tuned: str, **options: Any) -> ckptdiff.Diff:
    return ckptdiff.diff(folder / f"base_{base}.safetensors", folder / f"tuned_{tuned}.safetensors", **options)


def spectral(diff: ckptdiff.Diff) -> dict[str, Any]:
    return {facts.name: row["spectral"] for facts, row in zip(diff.tensors, diff.per_tensor, strict=True)}


@pytest.mark.parametrize("base", FORMS)
@pytest.mark.parametrize("mode", ["randomized", "exact"])
def test_figures_do_not_depend_on_how_the_tuned_side_is_stored(folder: Path, mode: str, base: str) -> None:
    expected = compared(folder, base, base, spectra=mode)
    for tuned in FORMS.keys() - {base}:
        found = compared(folder, base, tuned, spectra=mode)
        assert [facts.pieces != () for facts in found.tensors].count(True) == len(found.tensors) - 1
        assert_close(spectral(found), spectral(expected))
        assert_close(found.grouped("module"), expected.grouped("module"))


def assert_close(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_close(found[key], expected[key])
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    else:
        assert found == expected


@pytest.mark.parametrize("mode", ["randomized", "exact"])
def test_each_expert_is_a_matrix_fused_or_not(folder: Path, mode: str, tmp_path: Path) -> None:
    diffs = {
        base: compared(folder, base, "split", spectra=mode, out=tmp_path / f"{base}.h5") for base in ("split", "fused")
    }
    modules = {
        base: {row["module_type"]: row["spectral"] for row in diff.grouped("module")} for base, diff in diffs.items()
    }
    assert modules["fused"]["down_proj"]["matrices"] == 2
    for module_type in ("down_proj", "q_proj"):
        assert_close(modules["fused"][module_type], modules["split"][module_type])
    rows = spectral(diffs["split"])
    with RunFile(tmp_path / "split.h5") as split_run, RunFile(tmp_path / "fused.h5") as fused_run:
        assert fused_run.load().grouped("module") == diffs["fused"].grouped("module")
        lists = fused_run.spectra[f"{INSIDE}.down_proj"]
        for expert in (0, 2):
            name = f"{INSIDE}.{expert}.down_proj.weight"
            for key, values in split_run.spectra[name].items():
                np.testing.assert_allclose(lists[key][expert], values, rtol=1e-9)
    both = [rows[f"{INSIDE}.{expert}.down_proj.weight"]["stable_rank"] for expert in (0, 2)]
    assert spectral(diffs["fused"])[f"{INSIDE}.down_proj"]["stable_rank"] == pytest.approx(np.median(both), rel=1e-12)


def test_spectra_are_added_to_a_run_of_pieces(folder: Path, tmp_path: Path) -> None:
    for base, tuned in (("fused", "split"), ("split", "transposed")):
        path = tmp_path / f"{base}.h5"
        compared(folder, base, tuned, out=path)
        added, expected = add_spectra(path, "exact"), compared(folder, base, tuned, spectra="exact")
        assert added.per_tensor == expected.per_tensor and added.grouped("module") == expected.grouped("module")
        with RunFile(path) as run:
            assert run.load().grouped("module") == expected.grouped("module")


@pytest.mark.parametrize("base", ["fused", "transposed"])
@pytest.mark.parametrize("mode", ["randomized", "exact"])
def test_experts_that_the_tuned_side_lacks_have_none(folder: Path, mode: str, base: str, tmp_path: Path) -> None:
    """The others have what they have in a whole tensor, and one without its gate has none either."""
    tensors = load_file(folder / "tuned_split.safetensors")
    for name in ("0.down_proj", "2.gate_proj"):
        del tensors[f"{INSIDE}.{name}.weight"]
    save_file(tensors, tmp_path / "tuned.safetensors")
    base_path = folder / f"base_{base}.safetensors"
    found = ckptdiff.diff(base_path, tmp_path / "tuned.safetensors", spectra=mode, out=tmp_path / "run.h5")
    expected = compared(folder, base, "split", spectra=mode)
    missing = {f"{INSIDE}.gate_up_proj": 2, f"{INSIDE}.down_proj": 0}
    index = {facts.name: row for row, facts in enumerate(found.tensors)}
    assert index == {facts.name: row for row, facts in enumerate(expected.tensors)}
    for name, expert in missing.items():
        ours, theirs = (diff.spectra.experts[index[name]] for diff in (found, expected))
        assert np.isnan(ours[expert]).all() and len(ours) == EXPERTS
        others = [row for row in range(EXPERTS) if row != expert]
        np.testing.assert_allclose(ours[others], theirs[others], rtol=1e-9, atol=1e-12)
        assert "lacks it, or a part of it" in spectral(found)[name]["reason"]
    assert spectral(found)[ATTENTION] == spectral(expected)[ATTENTION]
    # Later, and of checkpoints that have moved.
    later = tmp_path / "later.h5"
    ckptdiff.diff(base_path, tmp_path / "tuned.safetensors", out=later)
    for name in ("base", "tuned"):
        (tmp_path / "moved" / name).mkdir(parents=True)
    save_file(load_file(base_path), tmp_path / "moved" / "base" / "model.safetensors")
    save_file(tensors, tmp_path / "moved" / "tuned" / "model.safetensors")
    moved = {name: tmp_path / "moved" / name / "model.safetensors" for name in ("base", "tuned")}
    assert add_spectra(later, mode, **moved).per_tensor == found.per_tensor
    with RunFile(tmp_path / "run.h5") as run:
        assert run.load().per_tensor == found.per_tensor


def test_an_adapter_leaves_out_what_the_tuned_side_has_in_part(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "tuned_split.safetensors")
    del tensors[f"{INSIDE}.2.gate_proj.weight"]
    save_file(tensors, tmp_path / "tuned.safetensors")
    made = extract_lora(folder / "base_fused.safetensors", tmp_path / "tuned.safetensors", tmp_path / "out", rank=4)
    reasons = {tensor.name: (tensor.shape, tensor.reason) for tensor in made.tensors}
    shape = (EXPERTS, 2 * INNER, HIDDEN)
    assert reasons[f"{INSIDE}.gate_up_proj"] == (shape, "the tuned side lacks a part of it")
    assert reasons[f"{INSIDE}.down_proj"][1] is None


def test_figures_of_each_expert_in_a_run_file(folder: Path, tmp_path: Path) -> None:
    path, place = tmp_path / "run.h5", f"spectra/{INSIDE}.down_proj/figures"
    compared(folder, "fused", "fused", spectra="randomized", out=path)
    with h5py.File(path, "r+") as file:
        keys, figures = file[place].attrs["keys"], file[place][:]
        assert figures.shape == (EXPERTS, len(keys.split())) and np.isnan(figures[1]).all()
        del file[place]
    with RunFile(path) as run:  # as 0.1.0 wrote it
        modules = {row["module_type"]: row["spectral"]["matrices"] for row in run.load().grouped("module")}
    assert modules == {"gate_up_proj": EXPERTS, "down_proj": 0, "q_proj": 1}
    with h5py.File(path, "r+") as file:
        file.create_dataset(place, data=figures[:2]).attrs["keys"] = keys
    with RunFile(path) as run, pytest.raises(RunFileError, match="figures"):
        run.load()


def factors(folder: Path, base: str, tuned: str, out: Path) -> Tensors:
    sides = folder / f"base_{base}.safetensors", folder / f"tuned_{tuned}.safetensors"
    extract_lora(*sides, out, rank=4)
    return load_file(out / "adapter_model.safetensors")


def test_factors_do_not_depend_on_how_the_tuned_side_is_stored(folder: Path, tmp_path: Path) -> None:
    expected = factors(folder, "split", "split", tmp_path / "expected")
    # Of the attention's matrix, and of all experts: PEFT fuses them, and wants the one without an update too.
    assert len(expected) == 2 * (3 * EXPERTS + 1)
    for tuned in ("fused", "transposed"):
        found = factors(folder, "split", tuned, tmp_path / tuned)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)


def quantised(kind: str) -> tuple[Tensors, np.ndarray]:
    """A weight as fp8 with blocks of 128, or as NVFP4, and the values of it."""
    values = (0.02 * np.random.default_rng(1).standard_normal((160, 192))).astype(BF16).astype(np.float32)
    name = ATTENTION.removesuffix(".weight")
    if kind == "fp8":
        scales = (1 + np.arange(4, dtype=np.float32).reshape(2, 2)) / 2000
        wide = scales.repeat(128, 0).repeat(128, 1)[: values.shape[0], : values.shape[1]]
        codes = (values / wide).astype(ml_dtypes.float8_e4m3fn)
        return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}, codes.astype(np.float32) * wide
    whole = np.float32(1e-4)
    groups = values.reshape(len(values), -1, 16)
    scales = (np.abs(groups).max(-1) / 6 / whole).astype(ml_dtypes.float8_e4m3fn)
    wide = scales.astype(np.float32)[..., None] * whole
    codes = (groups / wide).astype(ml_dtypes.float4_e2m1fn)
    plain = codes.view(np.uint8).reshape(len(values), -1) & 15
    tensors = {f"{name}.weight": plain[:, ::2] | plain[:, 1::2] << 4, f"{name}.weight_scale": scales}
    exact = codes.astype(np.float64) * scales.astype(np.float64)[..., None] * whole
    return tensors | {f"{name}.weight_scale_2": np.array(whole)}, exact.astype(np.float32).reshape(values.shape)


@pytest.mark.parametrize("mode", ["randomized", "exact"])
@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_spectra_of_a_quantised_weight_are_those_of_its_values(kind: str, mode: str, tmp_path: Path) -> None:
    tensors, decoded = quantised(kind)
    plain = (decoded + 1e-3 * np.random.default_rng(2).standard_normal(decoded.shape)).astype(BF16)
    for name, side in {"codes": tensors, "decoded": {ATTENTION: decoded}, "plain": {ATTENTION: plain}}.items():
        (tmp_path / name).mkdir()
        save_file(side, tmp_path / name / "model.safetensors")
    (tmp_path / "codes" / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
        if kind == "fp8"
        else "{}"
    )
    for compare in ("bf16", "stored"):
        for sides in (("plain", "{}"), ("{}", "plain")):
            found, expected = (
                ckptdiff.diff(*(tmp_path / side.format(other) for side in sides), spectra=mode, compare=compare)
                for other in ("codes", "decoded")
            )
            assert {found.tensors[0].dtype_base, found.tensors[0].dtype_tuned} == {"BF16", kind.upper()}
            assert spectral(found)[ATTENTION]["stable_rank"] is not None
            assert spectral(found) == spectral(expected)
