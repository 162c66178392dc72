"""Which tensors are quantised weights, by names, dtypes, shapes and config.json; and what is not decoded, and why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantised import LAYOUTS, fp8_codes, fp8_scales, grouped, packed_fp4, powers, reals, save

from ckptdiff.checkpoint import open_checkpoint, pair
from ckptdiff.checkpoint.encodings import Encoded, find_encoded

RNG = np.random.default_rng(0)
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def found(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Encoded:
    return find_encoded(open_checkpoint(save(folder, tensors, config)))


def fp8(m: int, n: int, *grid: int) -> dict[str, torch.Tensor]:
    return {"a.weight": fp8_codes(RNG, m, n), "a.weight_scale_inv": reals(RNG, *grid)}


def integers(words: int, groups: int, shape: tuple[int, ...] | None = None, rows: int = 8) -> dict[str, torch.Tensor]:
    tensors = {
        "a.weight_packed": torch.zeros(rows, words, dtype=torch.int32),
        "a.weight_scale": reals(RNG, rows, groups),
    }
    return tensors if shape is None else {**tensors, "a.weight_shape": torch.tensor(shape)}


def test_one_checkpoint_mixes_all_of_them(tmp_path: Path) -> None:
    """What is found of each layout does not depend on the others; what belongs to none is left alone."""
    tensors, names, config = {}, {}, {"quant_method": "fp8", "weight_block_size": [8, 16]}
    for number, layout in enumerate(LAYOUTS):
        sample = LAYOUTS[layout](np.random.default_rng(number), 16, 64)
        if sample.config.get("quant_method") == "compressed-tensors" and sample.encoding in ("FP8", "INT8"):
            continue
        if layout in ("DeepSeek fp8", "ModelOpt fp8", "fp8 with a scale for each expert"):
            continue
        module = "x" * (number + 1)
        tensors |= {name.replace("a.", f"{module}.", 1): tensor for name, tensor in sample.tensors.items()}
        names[sample.encoding] = names.get(sample.encoding, 0) + 1
    others = {"norm.weight": torch.ones(4), "xx.input_scale": torch.ones(1), "xx.k_scale": torch.ones(1)}
    encoded = found(tmp_path, tensors | others, config)
    assert encoded.warnings == ()
    assert encoded.parts == tensors.keys()
    encodings = [weight.encoding for weight in encoded.weights.values()]
    assert {name: encodings.count(name) for name in encodings} == names
    assert all(weight.name == name for name, weight in encoded.weights.items())


def test_a_checkpoint_without_codes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert found(tmp_path, {"a.weight": torch.ones(4, 4), "a.weight_scale": torch.ones(1)}) == Encoded(
        {}, frozenset(), ()
    )


@pytest.mark.parametrize(
    ("m", "n", "grid", "config", "block"),
    [
        (200, 300, (2, 3), FP8, (128, 128)),
        (200, 300, (50, 30), {"quant_method": "fp8", "weight_block_size": [4, 10]}, (4, 10)),
        (5, 300, (1, 3), FP8, (5, 128)),
        (5, 100, (1,), FP8, (5, 128)),
        (200, 300, (2, 3), {"quant_method": "fp8"}, (128, 128)),
        (256, 384, (2, 3), None, (128, 128)),
        (200, 300, (4, 1, 3, 1), None, (50, 100)),
        (200, 300, (), None, (200, 300)),
        (200, 300, (200, 1), None, (1, 300)),
        (200, 300, (200,), None, (1, 300)),
        (200, 300, (), {"quant_method": "fp8", "weight_block_size": None}, (200, 300)),
        (200, 300, (2, 1, 3, 1), {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, (128, 128)),
    ],
)
def test_blocks_of_fp8(
    m: int, n: int, grid: tuple[int, ...], config: dict[str, Any] | None, block: tuple[int, int], tmp_path: Path
) -> None:
    encoded = found(tmp_path, fp8(m, n, *grid), config)
    assert encoded.warnings == ()
    assert encoded.weights["a.weight"].block == block


BAD: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any] | None, str]] = {
    "a grid that is no ceil": (fp8(200, 300, 1, 3), FP8, r"shape \[1, 3\].*128x128 .*config.json.* make \[2, 3\]"),
    "a transposed grid": (fp8(200, 300, 3, 2), FP8, r"shape \[3, 2\]"),
    "one scale where blocks are announced": (fp8(200, 300), FP8, r"make \[2, 3\]"),
    "blocks where none are announced": (
        fp8(200, 300, 2, 3),
        {"quant_method": "fp8", "weight_block_size": None},
        "speaks of no blocks",
    ),
    "blocks that could be two": (fp8(200, 256, 2, 2), None, "128x128 or 100x128.*does not say"),
    "no blocks that could be": (fp8(200, 300, 7, 3), None, r"\[7, 3\] does not fit \[200, 300\]"),
    "a scale for each column": (fp8(200, 300, 1, 300), None, r"\[1, 300\] does not fit"),
    "scales of integers": (
        {"a.weight": fp8_codes(RNG, 8, 8), "a.weight_scale": torch.ones(1, dtype=torch.int64)},
        None,
        "weight_scale is I64",
    ),
    "two kinds of scales": ({**fp8(8, 8, 1, 1), "a.weight_scale": torch.ones(1)}, None, "no format that is known"),
    "fp8 with zero points": (
        {**fp8(8, 8, 1, 1), "a.weight_zero_point": torch.ones(1)},
        None,
        "no format that is known",
    ),
    "packed codes with reals": (
        {"a.weight": packed_fp4(RNG, 8, 16), "a.weight_scale": reals(RNG, 8, 1)},
        None,
        "weight_scale is F32",
    ),
    "no global scale": (
        {"a.weight_packed": packed_fp4(RNG, 8, 16), "a.weight_scale": fp8_scales(RNG, 8, 2)},
        None,
        "it has no weight_global_scale",
    ),
    "two global scales": (
        {
            "a.weight_packed": packed_fp4(RNG, 8, 16),
            "a.weight_scale": fp8_scales(RNG, 8, 2),
            "a.weight_global_scale": reals(RNG, 2),
        },
        None,
        r"weight_global_scale is F32 of shape \[2\]",
    ),
    "groups of 32": (
        {
            "a.weight": packed_fp4(RNG, 8, 16),
            "a.weight_scale": fp8_scales(RNG, 8, 1),
            "a.weight_scale_2": reals(RNG),
        },
        None,
        r"blocks of 1x16 \(NVFP4\) make \[8, 2\]",
    ),
    "blocks that are not of 16 bytes": (
        {"a_blocks": packed_fp4(RNG, 4, 8, 2, 8), "a_scales": powers(RNG, 4, 8, 2)},
        None,
        "not groups of 16 bytes",
    ),
    "the weight beside its codes": (
        {
            "a.weight": torch.ones(8, 32),
            "a.weight_packed": packed_fp4(RNG, 8, 16),
            "a.weight_scale": powers(RNG, 8, 1),
        },
        None,
        "the weight itself is stored beside it",
    ),
    "other bits than config.json says": (
        integers(4, 4, (8, 32)),
        grouped({"num_bits": 8, "type": "int", "strategy": "group", "group_size": 8}),
        "32 codes are 4 words, which 8 bits do not explain",
    ),
    "another format than config.json says": (
        {"a.weight": fp8_codes(RNG, 8, 8), "a.weight_scale": reals(RNG)},
        grouped({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}),
        "e4m3 codes, and .*config.json speaks of other formats",
    ),
    "another group than config.json says": (
        integers(4, 4, (8, 32)),
        grouped({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}),
        r"blocks of 1x16 .* make \[8, 2\]",
    ),
    "another format than ModelOpt says": (
        {"a.weight": fp8_codes(RNG, 8, 8), "a.weight_scale": reals(RNG)},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "speaks of other formats",
    ),
    "bits that could be two": (integers(1, 1, (8, 4)), None, "which 1 or 2 or 3 or 4 or 5 or 6 or 7 or 8 bits"),
    "no shape": (integers(4, 4), None, "it has no weight_shape"),
    "a shape of other rows": (integers(4, 4, (9, 32)), None, r"weight_shape says \[9, 32\]"),
    "a shape of no axes": (
        {**integers(4, 4), "a.weight_shape": torch.ones(2)},
        None,
        r"weight_shape says \[\]",
    ),
    "zero points of another shape": (
        {**integers(4, 4, (8, 32)), "a.weight_zero_point": torch.zeros(8, 4, dtype=torch.int32)},
        None,
        r"weight_zero_point is I32 of shape \[8, 4\], not I32 of \[1, 4\]",
    ),
    "columns in another order": (
        {**integers(4, 4, (8, 32)), "a.weight_g_idx": torch.zeros(32, dtype=torch.int32)},
        None,
        "no format that is known",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_stays_codes_and_is_named(what: str, tmp_path: Path) -> None:
    tensors, config, problem = BAD[what]
    encoded = found(tmp_path, tensors, config)
    assert encoded.weights == {} and encoded.parts == frozenset()
    (warning,) = encoded.warnings
    codes = next(name for name in ("a.weight_packed", "a_blocks", "a.weight") if name in tensors)
    assert warning.startswith(f"{tmp_path}/model.safetensors: {codes}: ")
    assert warning.endswith(": compared as stored codes")
    assert re.search(problem, warning), warning


def layers(count: int) -> dict[str, torch.Tensor]:
    """fp8 weights of several layers, each with its blocks."""
    tensors = {}
    for layer in range(count):
        for name, tensor in fp8(256, 384, 2, 3).items():
            tensors[name.replace("a.", f"layers.{layer}.q.")] = tensor
    return tensors


def test_a_scale_that_its_siblings_have(tmp_path: Path) -> None:
    tensors = layers(4)
    del tensors["layers.2.q.weight_scale_inv"], tensors["layers.3.q.weight_scale_inv"]
    encoded = found(tmp_path, {**tensors, "other.weight": fp8_codes(RNG, 8, 8)}, FP8)
    assert encoded.weights.keys() == {"layers.0.q.weight", "layers.1.q.weight"}
    path = tmp_path / "model.safetensors"
    said = f"{path}: layers.2.q.weight and 1 more: it has no scale, unlike its siblings: compared as stored codes"
    assert encoded.warnings == (said,)


@pytest.mark.parametrize("odd", [torch.ones(256, 1), torch.ones(()), torch.ones(2, 3, dtype=torch.bfloat16)])
def test_a_scale_unlike_those_of_its_siblings(odd: torch.Tensor, tmp_path: Path) -> None:
    encoded = found(tmp_path, {**layers(3), "layers.1.q.weight_scale_inv": odd})
    assert encoded.weights.keys() == {"layers.0.q.weight", "layers.2.q.weight"}
    (warning,) = encoded.warnings
    assert f"{tmp_path}/model.safetensors: layers.1.q.weight: its scales are not as those of its siblings" in warning


def test_layers_that_are_quantised_differently_are_no_odd_ones(tmp_path: Path) -> None:
    tensors = layers(3)
    del tensors["layers.1.q.weight_scale_inv"]
    tensors |= {"layers.1.q.weight": packed_fp4(RNG, 8, 16), "layers.1.q.weight_scale": fp8_scales(RNG, 8, 2)}
    tensors["layers.1.q.weight_scale_2"] = reals(RNG)
    encoded = found(tmp_path, tensors, FP8)
    assert encoded.warnings == ()
    assert [weight.encoding for weight in encoded.weights.values()].count("FP8") == 2


def test_weights_that_the_model_changes_are_said(tmp_path: Path) -> None:
    sample = LAYOUTS["NVFP4 of ModelOpt"](RNG, 8, 32)
    encoded = found(tmp_path / "0", {**sample.tensors, "a.pre_quant_scale": torch.ones(32)}, sample.config)
    assert encoded.weights.keys() == {"a.weight"}
    assert encoded.warnings == (
        f"{tmp_path}/0/model.safetensors: a.weight: pre_quant_scale beside it scales its columns: compared without",
    )
    sample = LAYOUTS["NVFP4 of compressed-tensors"](RNG, 8, 32)
    rotated = {**sample.config, "transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}
    encoded = found(tmp_path / "1", sample.tensors, rotated)
    assert encoded.weights.keys() == {"a.weight"}
    assert encoded.warnings == (
        f"{tmp_path}/1/config.json: its transform_config rotates weights: their values are compared as stored",
    )
    plain = {**sample.config, "transform_config": {"config_groups": {}}}
    assert found(tmp_path / "2", sample.tensors, plain).warnings == ()


def test_groups_of_targets(tmp_path: Path) -> None:
    """A group that names a module is its own; classes of modules may be any."""
    four, eight = ({"num_bits": bits, "type": "int", "strategy": "channel"} for bits in (4, 8))
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "0": {"targets": ["Linear"], "weights": four},
            "1": {"targets": ["re:.*down_proj", "re:("], "weights": eight},
            "2": {"targets": ["model.lm_head"], "weights": None},
        },
    }
    tensors = {}
    for name, words in (("up_proj", 1), ("down_proj", 2)):
        for key, tensor in integers(words, 1, (8, 5)).items():
            tensors[key.replace("a.", f"m.{name}.")] = tensor
    encoded = found(tmp_path, tensors, config)
    assert encoded.warnings == ()
    assert {name: weight.encoding for name, weight in encoded.weights.items()} == {
        "m.up_proj.weight": "INT4",
        "m.down_proj.weight": "INT8",
    }


def test_the_width_of_integers_without_their_shape(tmp_path: Path) -> None:
    config = grouped({"num_bits": 3, "type": "int", "strategy": "group", "group_size": 8})
    encoded = found(tmp_path, integers(3, 4), config)
    assert encoded.weights["a.weight"].shape == (8, 32) and encoded.weights["a.weight"].code == "int3"


def test_modelopts_own_file(tmp_path: Path) -> None:
    sample = LAYOUTS["ModelOpt fp8"](RNG, 8, 32)
    save(tmp_path, sample.tensors)
    own = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(own))
    (warning,) = find_encoded(open_checkpoint(tmp_path)).warnings
    assert f"{tmp_path}/hf_quant_config.json speaks of other formats" in warning
    own["quantization"] = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "FP8"}}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(own))
    encoded = find_encoded(open_checkpoint(tmp_path))
    assert encoded.warnings == () and encoded.weights["a.weight"].encoding == "FP8"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "is not used: it is not valid JSON"),
        ("[]", "is not used: it is not a JSON object"),
        ('{"quantization_config": [1]}', "is not understood"),
        ('{"quantization_config": {"quant_method": 1}}', "is not understood"),
        ('{"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}', "is not understood"),
        ('{"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, -1]}}', "blocks of"),
        ('{"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}}', "is not understood"),
        ('{"quantization_config": {"quant_method": "compressed-tensors", "config_groups": [1]}}', "is not understood"),
        (
            '{"quantization_config": {"quant_method": "compressed-tensors",'
            ' "config_groups": {"0": {"weights": {"num_bits": "four"}}}}}',
            "num_bits 'four'",
        ),
        ('{"text_config": {"quantization_config": {"quant_method": "gptq"}}}', "quant_method 'gptq' is not known"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_said(config: str, said: str, tmp_path: Path) -> None:
    save(tmp_path, fp8(256, 384, 2, 3))
    (tmp_path / "config.json").write_text(config)
    encoded = find_encoded(open_checkpoint(tmp_path))
    assert encoded.weights.keys() == {"a.weight"}
    (warning,) = encoded.warnings
    assert warning.startswith(f"{tmp_path}/config.json") and said in warning


def test_a_configuration_that_changes_is_read_again(tmp_path: Path) -> None:
    save(tmp_path, fp8(200, 256, 2, 2), FP8)
    assert find_encoded(open_checkpoint(tmp_path)).weights["a.weight"].block == (128, 128)
    save(tmp_path, fp8(200, 256, 2, 2), {"quant_method": "fp8", "weight_block_size": [100, 128]})
    assert find_encoded(open_checkpoint(tmp_path)).weights["a.weight"].block == (100, 128)


def test_parts_in_several_files(tmp_path: Path) -> None:
    sample = LAYOUTS["3 bits in words, zero points"](RNG, 8, 32)
    for number, (name, tensor) in enumerate(sample.tensors.items(), 1):
        save(tmp_path / str(number), {name: tensor})
        source = tmp_path / str(number) / "model.safetensors"
        source.rename(tmp_path / f"model-{number:05d}-of-{len(sample.tensors):05d}.safetensors")
        source.parent.rmdir()
    encoded = find_encoded(open_checkpoint(tmp_path))
    assert len({part.shard.path for part in encoded.weights["a.weight"].parts}) == len(sample.tensors) == 4


@pytest.mark.parametrize(
    "tensors",
    [
        {"a.weight": packed_fp4(RNG, 8, 16)},
        {"a.weight_packed": packed_fp4(RNG, 8, 16)},
        {"a_blocks": packed_fp4(RNG, 8, 16)},
        {"a.qweight": torch.zeros(8, 16, dtype=torch.int32), "a.scales": torch.ones(1)},
        {"a.weight": torch.zeros(8, 16, dtype=torch.int8), "a.weight_scale": torch.ones(8)},
        {"a.up": packed_fp4(RNG, 8, 16), "a.up_weight_scale": powers(RNG, 8, 2)},
    ],
)
def test_packed_codes_that_are_compared_as_such_are_said(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path, {**tensors, "b.position_ids": torch.zeros(3, dtype=torch.int64)}))
    (warning,) = pair(checkpoint, checkpoint).warnings
    assert warning == "1 tensor holds packed codes: compared as raw codes, unscaled"


@pytest.mark.parametrize("method", ["fbgemm_fp8", "fp8"])
def test_a_scale_for_each_row(tmp_path: Path, method: str) -> None:
    tensors = {"a.weight": fp8_codes(RNG, 256, 256), "a.weight_scale": reals(RNG, 256, 1)}
    encoded = found(tmp_path, tensors, {"quant_method": method, "weight_block_size": None})
    assert encoded.warnings == () and encoded.weights["a.weight"].block == (1, 256)
