"""Models saved in both layouts of their library: all of them is compared, and figures are those of the models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import ckptdiff
from ckptdiff import RunFile
from ckptdiff.report.as_json import document

from models import MODELS, build  # isort: skip

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

EXPERTS = [
    *["deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe", "granitemoe", "granitemoehybrid", "jamba"],
    *["kimi_linear", "lfm2_moe", "minimax", "minimax_m2", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe"],
    *["qwen3_moe", "qwen3_next"],
]
RENAMED = [
    *["detr", "dinov2", "dinov3_vit", "esm", "gemma3_vlm", "gpt_neox", "internvl", "llava", "mistral3", "paligemma"],
    *["qwen2_5_vl", "qwen2_audio", "qwen2_vl", "segformer", "swin", "vit", "vit_mae"],
]
ALIKE = ["bloom", "falcon", "gemma2", "gpt2", "gpt_oss", "llama", "llama4_text", "mamba2", "qwen3_vl_moe", "t5"]
"""Both layouts are one."""
LAYOUTS = {"published": True, "modules": False}
LEFT_OUT = {"esm": "esm.rotary_embeddings.inv_freq"}
"""What the library saves under a name with a star in it."""

Codes = Mapping[str, np.ndarray]


class Saved(NamedTuple):
    """A model before and after, in memory as codes of bfloat16, and its folders."""

    base: Codes
    tuned: Codes
    folder: Path

    def diff(self, base: str, tuned: str, **options: Any) -> ckptdiff.Diff:
        return ckptdiff.diff(self.folder / f"base_{base}", self.folder / f"tuned_{tuned}", **options)


def codes_of(model: Any) -> Codes:
    """Values of all parameters and of what is saved beside them, each once."""
    kept = dict.fromkeys(model.state_dict())
    return {
        name: tensor.detach().view(torch.int16).numpy().view(np.uint16).copy()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if name in kept and tensor.dtype == torch.bfloat16
    }


def save(model: Any, folder: Path) -> Saved:
    """Save a model in both layouts, move a tenth of its codes by one step, and save it again."""
    model = model.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        base = codes_of(model)
        save_both(model, folder, "base")
        for parameter in model.parameters():
            parameter.view(torch.int16).add_(torch.rand(parameter.shape, generator=generator) < 0.1)
        save_both(model, folder, "tuned")
    return Saved(base, codes_of(model), folder)


def save_both(model: Any, folder: Path, side: str) -> None:
    for layout, original in LAYOUTS.items():
        model.save_pretrained(folder / f"{side}_{layout}", save_original_format=original)


def real(codes: np.ndarray) -> np.ndarray:
    return codes.view(ml_dtypes.bfloat16).astype(np.float64)


def joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([real(codes).reshape(-1) for codes in arrays])


def check(diff: ckptdiff.Diff, base: np.ndarray, tuned: np.ndarray) -> None:
    """Global figures are those of these values."""
    found, delta = document(diff)["global"], tuned - base
    assert found["unchanged_bitwise"] == np.count_nonzero(delta == 0) / base.size
    assert found["changed"] == np.count_nonzero(np.abs(delta) > 1e-5)
    for norm, expected in (("base_norm", base), ("tuned_norm", tuned), ("delta_norm", delta)):
        assert found[norm] == pytest.approx(np.linalg.norm(expected), rel=1e-12)
    assert found["rel_norm"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(base), rel=1e-12)
    assert found["max_abs"] == np.abs(delta).max()


@pytest.mark.parametrize("family", [*EXPERTS, *RENAMED, *ALIKE])
def test_layouts_against_each_other(family: str, tmp_path: Path) -> None:
    saved = save(build(family), tmp_path)
    for base, tuned in (("published", "published"), ("published", "modules"), ("modules", "published")):
        left = saved.base[LEFT_OUT[family]].size if family in LEFT_OUT and base != tuned else 0
        diff = saved.diff(base, tuned)
        for coverage in diff.coverage.values():
            assert coverage.compared + left == coverage.values == sum(codes.size for codes in saved.base.values())
        assert len(diff.only_in_base) == len(diff.only_in_tuned) == bool(left) and not diff.mismatched
        assert not diff.warnings
        compared = [name for name in saved.base if not left or name != LEFT_OUT[family]]
        check(diff, *(joined(side[name] for name in compared) for side in (saved.base, saved.tuned)))


def test_masks_are_those_of_the_base_in_its_own_layout(tmp_path: Path) -> None:
    saved = save(build("qwen3_moe"), tmp_path)
    for base, tuned in (("published", "modules"), ("modules", "published")):
        saved.diff(base, tuned, mask="bitwise", out=tmp_path / f"{base}.h5")
        before, after = (stored(tmp_path / f"{side}_{base}") for side in ("base", "tuned"))
        with RunFile(tmp_path / f"{base}.h5") as run:
            assert set(run.masks) == before.keys()
            for name, mask in run.masks.items():
                np.testing.assert_array_equal(mask.dense(), before[name] != after[name])


LACKING = ["qwen3_moe", "mixtral", "deepseek_v3", "jamba", "phimoe", "minimax_m2"]


@pytest.mark.parametrize("family", LACKING)
def test_a_tuned_side_that_lacks_pieces(family: str, tmp_path: Path) -> None:
    """What is left of a fused tensor is compared; the library itself says which of its values are missing."""
    saved = save(build(family), tmp_path)
    tuned = tmp_path / "tuned_published"
    tensors = stored(tuned)
    gone = set(np.random.default_rng(3).choice([name for name in tensors if ".experts." in name], 5))
    known = known_values(build(family), tuned, gone, tmp_path / "marked", saved.base)
    write(tuned, {name: codes for name, codes in tensors.items() if name not in gone})
    assert_part(saved, known, gone, tmp_path)


def known_values(model: Any, published: Path, gone: set[str], folder: Path, like: Codes) -> Codes:
    """Load ones, and zeros in place of what is gone, from the published layout: ones are what is known of a model."""
    shutil.copytree(published, folder)
    one = np.array(1, ml_dtypes.bfloat16).view(np.uint16)
    marks = {name: np.full_like(codes, one * (name not in gone)) for name, codes in stored(published).items()}
    write(folder, marks)
    loaded = codes_of(type(model).from_pretrained(folder, dtype=torch.bfloat16))
    return {name: loaded[name] == one if name in loaded else np.ones_like(codes, bool) for name, codes in like.items()}


def write(folder: Path, tensors: Codes) -> None:
    from safetensors.torch import save_file

    held = {name: torch.from_numpy(codes.view(np.int16)).view(torch.bfloat16) for name, codes in tensors.items()}
    save_file(held, folder / "model.safetensors", {"format": "pt"})


def assert_part(saved: Saved, known: Codes, gone: set[str], folder: Path) -> None:
    """Figures and masks are those of the known values; the others count as only in base."""
    diff = saved.diff("modules", "published", mask="bitwise", out=folder / "run.h5")
    lost = {name: int((~there).sum()) for name, there in known.items() if not there.all()}
    everything = sum(codes.size for codes in saved.base.values())
    left = everything - sum(lost.values())
    assert lost and diff.coverage["base"].values == everything
    assert [side.compared for side in diff.coverage.values()] == [left, left] == [left, diff.coverage["tuned"].values]
    assert sum(group["values"] for group in diff.base["left_out"]) == sum(lost.values()) and not diff.identical
    plain = saved.diff("modules", "published")
    check(plain, *(joined(codes[known[name]] for name, codes in side.items()) for side in (saved.base, saved.tuned)))
    rows = {row["name"]: row for row in document(diff)["tensors"]}
    whole = {name for name in lost if known[name].any()}
    assert set(diff.only_in_base) == lost.keys() - whole
    with RunFile(folder / "run.h5") as run:
        for name, there in known.items():
            if name in whole:
                assert rows[name]["shape"] == list(there.shape) and rows[name]["numel"] == there.sum()
                assert all(piece["tuned_name"] not in gone for piece in rows[name]["pieces"])
            if name in rows:
                expected = (saved.base[name] != saved.tuned[name]) & there
                np.testing.assert_array_equal(run.masks[name].dense(), expected)


def halves(name: str, array: np.ndarray, start: int) -> np.ndarray:
    """Gate or up of a fused tensor, as [out, in]: one after the other, or in turns in GPT-OSS."""
    if name.endswith("_bias"):
        return array[..., start::2]
    return np.ascontiguousarray(array[..., start::2].swapaxes(1, 2))


def split(family: str, name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """A tensor of a model that the library never splits, in the pieces that other families have."""
    stem, _, leaf = name.rpartition(".")
    if family == "gpt2" and ".c_attn." in name:
        parts = np.split(array, 3, -1)
        letters = (f"{stem.removesuffix('c_attn')}{letter}_proj.{leaf}" for letter in "qkv")
        return {one: np.ascontiguousarray(part.T) for one, part in zip(letters, parts, strict=True)}
    if family == "phi3" and ".qkv_proj." in name:
        parts = np.split(array, [32, 48])  # four heads of q, two of k and v
        return {name.replace("qkv", letter): part for letter, part in zip("qkv", parts, strict=True)}
    if family == "phi3" and ".gate_up_proj." in name:
        return {
            name.replace("gate_up", half): part for half, part in zip(("gate", "up"), np.split(array, 2), strict=True)
        }
    if family in ("gpt_oss", "llama4_text") and ".experts." in name:
        bias = leaf.endswith("_bias")
        kind = "bias" if bias else "weight"
        if "gate_up" not in leaf:
            parts = {"down": array if bias else array.swapaxes(1, 2)}
        elif family == "gpt_oss":
            parts = {half: halves(name, array, start) for start, half in enumerate(("gate", "up"))}
        else:
            parts = dict(zip(("gate", "up"), np.split(array.swapaxes(1, 2), 2, 1), strict=True))
        return {
            f"{stem}.{expert}.{part}_proj.{kind}": np.ascontiguousarray(one)
            for part, stack in parts.items()
            for expert, one in enumerate(stack)
        }
    return {name: array}


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "phi3", "gpt2"])
def test_a_tuned_side_in_pieces_that_lacks_some(family: str, tmp_path: Path) -> None:
    """Transposed, in turns, biases, q, k and v: families that the library stores in one layout."""
    saved = save(build(family), tmp_path)
    tuned = tmp_path / "tuned_published"
    tensors = {}
    for name, codes in stored(tuned).items():
        tensors |= split(family, name, codes)
    gone = {"gpt_oss": ("0.gate_proj.weight", "1.up_proj.bias", "2.down_proj.weight", "3.down_proj.bias")}
    gone["llama4_text"] = ("0.gate_proj.weight", "1.up_proj.weight", "1.gate_proj.weight", "3.down_proj.weight")
    gone["phi3"] = ("0.self_attn.k_proj.weight", "1.self_attn.v_proj.weight", "1.mlp.gate_proj.weight")
    gone["gpt2"] = ("0.attn.k_proj.weight", "0.attn.q_proj.bias", "1.attn.v_proj.weight")
    lost = {name for name in tensors if name.endswith(gone[family])}
    assert len(lost) >= 3
    known = {name: np.ones_like(codes, bool) for name, codes in saved.base.items()}
    at = np.cumsum([0] + [codes.size for codes in saved.base.values()])
    for name, begin, end in zip(saved.base, at[:-1].tolist(), at[1:].tolist(), strict=True):
        # Each value's own number takes the way into pieces, and says where it was.
        numbers = np.arange(begin, end).reshape(saved.base[name].shape)
        for piece, held in split(family, name, numbers).items():
            if piece in lost:
                known[name].reshape(-1)[held.reshape(-1) - begin] = False
    write(tuned, {name: codes for name, codes in tensors.items() if name not in lost})
    assert_part(saved, known, lost, tmp_path)


def stored(folder: Path) -> Codes:
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    return {name: tensor.view(torch.int16).numpy().view(np.uint16) for name, tensor in tensors.items()}


def mxfp4(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks and scales of rows [..., n], as GPT-OSS stores them: [..., n / 32, 16] and [..., n / 32]."""
    groups = values.reshape(*values.shape[:-1], -1, 32)
    exponents = np.floor(np.log2(np.abs(groups).max(-1))) - 2
    codes = (groups / 2.0 ** exponents[..., None]).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents + 127).astype(np.uint8)


@pytest.mark.parametrize("inner", [64, 32], ids=["oblong", "square"])
def test_experts_of_gpt_oss_against_their_own_mxfp4(inner: int, tmp_path: Path) -> None:
    """Blocks are of [out, in], the bfloat16 model holds [in, out]; a square down_proj does not tell them apart."""
    from safetensors.torch import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    config = transformers.GptOssConfig(**MODELS["gpt_oss"].sizes | {"intermediate_size": inner})
    saved = save(transformers.GptOssForCausalLM(config), tmp_path)
    plain, quantised = tmp_path / "base_published", tmp_path / "quantised"
    tensors = load_file(plain / "model.safetensors")
    right = {name: real(codes) for name, codes in saved.base.items()}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        packed = [torch.from_numpy(part).contiguous() for part in mxfp4(right[name].swapaxes(1, 2))]
        del tensors[name]
        tensors |= {f"{name}_blocks": packed[0], f"{name}_scales": packed[1]}
        right[name] = convert_moe_packed_tensors(*packed, dtype=torch.float32).numpy().astype(np.float64)
    shutil.copytree(plain, quantised)
    save_file(tensors, quantised / "model.safetensors")
    settings = json.loads((plain / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (quantised / "config.json").write_text(json.dumps(settings))
    original = {name: real(codes) for name, codes in saved.base.items()}
    for sides, names in (((plain, quantised), (original, right)), ((quantised, plain), (right, original))):
        diff = ckptdiff.diff(*sides, mask="bitwise", out=tmp_path / f"{sides[0].name}.h5")
        assert [coverage.share for coverage in diff.coverage.values()] == [1, 1] and not diff.warnings
        check(diff, *(np.concatenate([values.reshape(-1) for values in side.values()]) for side in names))
        rows = {row["name"]: row for row in document(diff)["tensors"]}
        quantised_side = "dtype_base" if sides[0] == quantised else "dtype_tuned"
        with RunFile(tmp_path / f"{sides[0].name}.h5") as run:
            for name, values in original.items():
                moved = values != right[name]
                if ".experts." in name and not name.endswith("bias"):
                    assert rows[name][quantised_side] == "MXFP4"
                    error = np.linalg.norm(right[name] - values) / np.linalg.norm(names[0][name])
                    assert rows[name]["rel_norm"] == pytest.approx(error, rel=1e-12) and 0.05 < error < 0.2
                    moved = moved.swapaxes(1, 2) if sides[0] == quantised else moved
                np.testing.assert_array_equal(run.masks[name].dense(), moved)
