"""Adapters of whole models: PEFT loads all that an export says it holds, and the model then computes what it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import ckptdiff
from ckptdiff.exports import export_shira
from ckptdiff.exports.adaptable import FUSED_EXPERTS, MERGED_EXPERTS, Adapted
from ckptdiff.lora import extract_lora
from ckptdiff.options import Options

from models import MODELS, build  # isort: skip

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

QUICK = ("llama", "qwen3_moe", "gpt2", "mamba", "vit")
RENAMED = ("vit", "llava", "qwen2_vl", "swin", "segformer", "detr", "dinov2", "nemotron_h")
"""Those whose checkpoints have other names than their modules."""
SPLIT = ("qwen3_moe", "mixtral", "deepseek_v3", *FUSED_EXPERTS)
"""Those whose checkpoints have experts one by one."""
OTHERS = ("qwen3", "gpt_oss", "gemma3_text", "bert_mlm", "t5", "granitemoe", *RENAMED)
FAMILIES = (*dict.fromkeys((*QUICK, *SPLIT, *OTHERS)),)
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


def moved(model: Any, names: set[str] | None = None) -> Any:
    """The model with every value of some parameters changed, or of all."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change = 0.2 * torch.randn(parameter.shape, generator=generator)
            if names is None or name in names:
                parameter += change
    return model


def logits(model: Any) -> Any:
    """What a model computes first of all that it does; of one with two towers, without a picture."""
    config = model.config
    config.use_cache = False
    tokens = (torch.arange(24).reshape(2, 12) * 5) % 60 + 1
    given = {"input_ids": tokens}
    if getattr(model, "main_input_name", "") == "pixel_values":
        size = getattr(config, "image_size", 64)
        pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        given = {"pixel_values": pixels}
    elif config.is_encoder_decoder:
        given["decoder_input_ids"] = tokens.flip(1)
    with torch.no_grad():
        return model.eval()(**given)[0]


def stored_in(folder: Path, name: str) -> tuple[Path, Path]:
    """Base and tuned checkpoints, in which every value differs."""
    build(name).save_pretrained(folder / "base")
    moved(build(name)).save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def without(folder: Path, left_out: set[str]) -> Any:
    """The tuned model, with the base's tensors where an adapter leaves them out."""
    import transformers
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "tuned" / "model.safetensors")
    with safe_open(folder / "base" / "model.safetensors", "pt") as base:
        assert left_out <= set(base.keys())
        tensors |= {name: base.get_tensor(name) for name in left_out}
    (folder / "mixed").mkdir()
    save_file(tensors, folder / "mixed" / "model.safetensors", {"format": "pt"})
    (folder / "mixed" / "config.json").write_bytes((folder / "tuned" / "config.json").read_bytes())
    (architecture,) = transformers.AutoConfig.from_pretrained(folder / "base").architectures
    return getattr(transformers, architecture).from_pretrained(folder / "mixed")


def assert_holds_the_rest(name: str, folder: Path, left_out: set[str]) -> None:
    """Base and adapter compute what the tuned model does with the base's values of what was left out."""
    base = build(name)
    plain = logits(base)
    wanted = logits(without(folder, left_out))
    found = logits(peft.PeftModel.from_pretrained(base, folder / "adapter"))
    distance = (wanted - plain).norm()
    assert distance > 1e-3 * plain.norm()
    assert (found - wanted).norm() < 1e-4 * distance


@pytest.mark.parametrize("name", EVERY)
def test_a_lora_of_full_rank_is_the_update_but_for_what_it_lists(name: str, tmp_path: Path) -> None:
    sides = stored_in(tmp_path, name)
    made = extract_lora(*sides, tmp_path / "adapter", rank=128)
    held = [tensor for tensor in made.tensors if tensor.rank]
    assert all(tensor.rank <= min(tensor.shape[-2:]) for tensor in held)
    assert all(tensor.lost < 1e-5 for tensor in held)
    assert_holds_the_rest(name, tmp_path, {tensor.name for tensor in made.tensors if tensor.reason})
    left = {tensor.reason for tensor in made.tensors if tensor.reason}
    assert ("refused by PEFT in models of type mamba" in left) == (name == "mamba")
    experts = [tensor for tensor in held if ".experts." in tensor.name]
    assert bool(experts) == (name == "gpt_oss" or name in SPLIT)


@pytest.mark.parametrize("name", EVERY)
def test_a_shira_of_many_coordinates_is_the_update_but_for_what_it_lists(name: str, tmp_path: Path) -> None:
    if name == "gpt2":
        pytest.skip("all of its layers are Conv1D, which SHiRA does not adapt")
    sides = stored_in(tmp_path, name)
    ckptdiff.diff(*sides, out=tmp_path / "run.h5", mask="none")
    with ckptdiff.RunFile(tmp_path / "run.h5") as run:
        made = export_shira(run, tmp_path / "adapter", rank=1)
    left_out = {tensor.name for tensor in made.left_out}
    assert made.whole + sum(tensor.share for tensor in made.left_out) <= 1
    assert made.whole < made.energy
    # What it holds is the tuned value there, so that a tuned side with the base's values elsewhere is what it makes.
    from safetensors.torch import load_file, save_file

    tensors, base = (load_file(side / "model.safetensors") for side in sides[::-1])
    adapted = Adapted.of(str(sides[0] / "model.safetensors"), [(key, values.shape) for key, values in base.items()])
    stored = {adapted.called(key): key for key in base}
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as adapter:
        for key in [key for key in adapter.keys() if key.endswith("indices")]:  # noqa: SIM118
            weight = stored[key.removeprefix("base_model.model.").removesuffix("shira_indices") + "weight"]
            rows, columns = adapter.get_tensor(key).long()
            values = base[weight].clone()
            values[rows, columns] = tensors[weight][rows, columns]
            tensors[weight] = values
            assert weight not in left_out
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    assert_holds_the_rest(name, tmp_path, left_out)


@pytest.mark.parametrize(
    "name", ["qwen3_moe", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt_oss", "qwen2_moe"))]
)
def test_ranks_by_energy_load_and_lose_what_is_said(name: str, tmp_path: Path) -> None:
    """Of experts that did not change too: PEFT stacks those of a layer."""
    build(name).save_pretrained(tmp_path / "base")
    chosen = {n for n, _ in build(name).named_parameters() if ".0.mlp.experts." in n or "q_proj" in n}
    tuned = moved(build(name), chosen)
    with torch.no_grad():
        for parameter_name, parameter in tuned.named_parameters():
            if ".experts.gate_up_proj" in parameter_name and not parameter_name.endswith("bias"):
                parameter[1] = build(name).get_parameter(parameter_name)[1]
    tuned.save_pretrained(tmp_path / "tuned")
    made = extract_lora(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=32, energy=0.6)
    ranks = {tensor.name: tensor.rank for tensor in made.tensors if tensor.rank}
    assert len({*ranks.values()}) > 1
    base = build(name)
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    after, wanted = dict(merged.named_parameters()), dict(tuned.named_parameters())
    with torch.no_grad():
        total = sum((wanted[n] - before[n]).double().square().sum() for n in before)
        missed = sum((wanted[n] - after[n]).double().square().sum() for n in before)
    assert float(missed / total) == pytest.approx(made.lost, rel=1e-3)
    assert 0.1 < made.lost < 0.5


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe"])
def test_experts_that_are_not_compared_are_there_for_peft(name: str, tmp_path: Path) -> None:
    sides = stored_in(tmp_path, name)
    only = Options(include=("*.layers.0.mlp.experts.1.up_proj.weight", "*.layers.0.mlp.experts.2.gate_proj.weight"))
    made = extract_lora(*sides, tmp_path / "adapter", rank=32, options=only)
    held = {tensor.name for tensor in made.tensors}
    assert len(held) == 2
    with safe_open(sides[0] / "model.safetensors", "pt") as base:
        assert_holds_the_rest(name, tmp_path, {*base.keys()} - held)


@pytest.mark.parametrize("name", [n if n in RENAMED[:3] else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_adapters_have_the_names_that_modules_have(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        shapes = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
    adapted = Adapted.of(str(tmp_path / "model.safetensors"), shapes.items())
    modules = {f"{module}.weight" for module, _ in model.named_modules()}
    parameters = {parameter for parameter, _ in model.named_parameters()}
    held = {adapted.called(key): adapted.way(adapted.called(key), shape, True, "lora") for key, shape in shapes.items()}
    assert {key for key, (way, _) in held.items() if way in ("linear", "conv1d")} <= modules
    assert {key for key, (way, _) in held.items() if way in ("parameter", "stack")} <= parameters


def test_families_whose_experts_peft_stacks_are_those_of_the_table() -> None:
    from peft.utils import transformers_weight_conversion as conversion

    assert not FUSED_EXPERTS.keys() & conversion._MODEL_TO_CONVERSION_PATTERN.keys()
    found = {
        kind: tuple(name for name in conversion._MOE_TARGET_MODULE_MAPPING[pattern] if name != "gate")
        for kind, pattern in conversion._MODEL_TO_CONVERSION_PATTERN.items()
        if pattern in conversion._MOE_FUSED_TARGETS and kind.islower()
    }
    assert {kind: tuple(sorted(names)) for kind, names in found.items()} == {
        kind: tuple(sorted(names)) for kind, names in MERGED_EXPERTS.items()
    }


def test_the_command_lists_what_a_shira_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ckptdiff.cli import main

    sides = stored_in(tmp_path, "qwen3_moe")
    run = str(tmp_path / "run.h5")
    assert main(["diff", *map(str, sides), "-o", run, "-q"]) in (0, 1)
    capsys.readouterr()
    assert main(["mask", "export", run, "--layout", "shira", "--rank", "2", "-o", str(tmp_path / "a")]) == 0
    told = capsys.readouterr()
    assert "of the whole update's, written to" in told.out + told.err
    assert "24 tensors (an expert, which models have fused" in told.err
