"""Masks of a checkpoint in one layout train a model in another, coordinate by coordinate."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from zoo.models import build

import ckptdiff
from ckptdiff.checkpoint.header import Shard, TensorInfo
from ckptdiff.checkpoint.weights import Piece
from ckptdiff.errors import MaskError
from ckptdiff.retrain import MaskedSGD, load_masks
from ckptdiff.retrain.placing import place

EVERY = (
    *("qwen2_moe", "qwen3_moe", "qwen3_next", "mixtral", "deepseek_v2", "deepseek_v3", "glm4_moe", "olmoe", "phimoe"),
    *("jamba", "lfm2_moe", "minimax", "minimax_m2", "granitemoe", "granitemoehybrid", "gpt_oss", "qwen3_vl_moe"),
    *("gpt_neox", "nemotron_h", "vit", "dinov2", "swin", "segformer", "vit_mae", "esm", "gpt2", "llama", "llava"),
)
FEW = ("qwen3_moe", "mixtral", "segformer")


class Holder(torch.nn.Module):
    """Parameters of any names."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            parent: torch.nn.Module = self
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, torch.nn.Module())
                parent = parent._modules[part]
            parent.register_parameter(last, torch.nn.Parameter(tensor.clone(), tensor.is_floating_point()))


def moved(model: torch.nn.Module, seed: int) -> None:
    """Change some of the coordinates of what is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in filter(lambda one: one.requires_grad, model.parameters()):
            parameter += 0.25 * (torch.rand(parameter.shape, generator=generator) < 0.2)


def saved(name: str, folder: Path, *, original: bool = True) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model and one that was moved, both saved."""
    sides = build(name), build(name)
    moved(sides[1], 1)
    for side, model in zip(("base", "tuned"), sides, strict=True):
        model.save_pretrained(folder / side, save_original_format=original)
    return sides


def compared(folder: Path, base: str = "base", tuned: str = "tuned", **options: object) -> Path:
    run = folder / "run.h5"
    ckptdiff.diff(folder / base, folder / tuned, out=run, mask="bitwise", **options)
    return run


def assert_changed(run: Path, base: torch.nn.Module, tuned: torch.nn.Module, **options: object) -> None:
    """Each parameter's mask is where the two models differ, said by torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = load_masks(run, base, **options)
    assert masks.report.complete and not masks.report.left_out
    others = dict(tuned.named_parameters())
    for name, parameter in base.named_parameters():
        assert np.array_equal(masks[parameter].dense(), (parameter != others[name]).numpy()), name
    assert len({*masks.names.values()}) == len(masks)


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in EVERY]
)
def test_masks_of_what_a_model_saves_load_into_the_model(name: str, tmp_path: Path) -> None:
    base, tuned = saved(name, tmp_path)
    assert_changed(compared(tmp_path), base, tuned)


@pytest.mark.parametrize("name", ["qwen3_moe", pytest.param("granitemoe", marks=pytest.mark.slow)])
def test_masks_of_fused_tensors_load_into_single_ones(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path, original=False)
    run = compared(tmp_path)
    sides = []
    for seed in (0, 1):
        model = build(name)
        if seed:
            moved(model, 1)
        model.save_pretrained(tmp_path / f"published{seed}")
        sides.append(Holder(load_file(tmp_path / f"published{seed}" / "model.safetensors")))
    if name == "qwen3_moe":
        assert "model.layers.0.mlp.experts.3.up_proj.weight" in dict(sides[0].named_parameters())
    assert_changed(run, *sides)


@pytest.mark.parametrize("names", ["base", "tuned"])
def test_a_run_of_two_layouts_serves_models_of_both(names: str, tmp_path: Path) -> None:
    base, tuned = build("mixtral"), build("mixtral")
    moved(tuned, 1)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned", save_original_format=False)
    tuned.save_pretrained(tmp_path / "published")
    run = compared(tmp_path)
    assert_changed(run, base, tuned, names=names)
    single = [Holder(load_file(tmp_path / side / "model.safetensors")) for side in ("base", "published")]
    assert_changed(run, *single, names=names)


def test_pieces_that_only_the_run_knows_are_those_of_the_tuned_side(tmp_path: Path) -> None:
    """A map gives names that no table has."""
    rng = torch.Generator().manual_seed(0)
    base = {f"model.layers.0.mlp.{part}_proj.weight": torch.randn(6, 4, generator=rng) for part in ("gate", "up")}
    changed = {name: value + (torch.rand(value.shape, generator=rng) < 0.4) for name, value in base.items()}
    fused = [torch.cat(list(side.values())) for side in (base, changed)]
    tuned = {"model.layers.0.mlp.gate_up_proj.weight": fused[1]}
    for side, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / side).mkdir()
        save_file(tensors, tmp_path / side / "model.safetensors")
    run = compared(tmp_path)
    model = Holder({"model.layers.0.mlp.gate_up_proj.weight": fused[0]})
    masks = load_masks(run, torch.compile(model), names="tuned")
    (parameter,) = model.parameters()
    assert np.array_equal(masks[parameter].dense(), (fused[0] != fused[1]).numpy())
    assert masks.names[parameter] == "model.layers.0.mlp.gate_up_proj.weight"
    cut = Holder({"model.layers.0.mlp.gate_up_proj.weight": fused[0][:10]})
    with pytest.raises(MaskError, match="does not fit") as caught:
        load_masks(run, cut, names="tuned")
    assert "gate_up_proj" in str(caught.value.expected) and "(10, 4)" in str(caught.value.found)


def test_experts_without_a_mask_are_named_and_what_is_left_out_counted(tmp_path: Path) -> None:
    base, tuned = saved("qwen3_moe", tmp_path)
    run = compared(tmp_path, exclude=("*.layers.1.mlp.experts.2.up_proj.*",))
    fused = "model.layers.1.mlp.experts.gate_up_proj"
    with pytest.raises(MaskError, match="do not match") as caught:
        load_masks(run, base)
    assert fused in str(caught.value.found)
    with pytest.warns(UserWarning, match="1 parameter without a mask"):
        masks = load_masks(run, base, strict=False)
    assert masks.report.unmasked_parameters == (fused,) and not masks.report.left_out
    parameter = base.get_parameter(fused)
    expected = (parameter != tuned.get_parameter(fused)).numpy()
    expected[2, 24:] = False
    assert np.array_equal(masks[parameter].dense(), expected)
    # A model of fewer experts has no place for the others.
    del base.model.layers[0]
    with pytest.warns(UserWarning, match=r"% of the masks' coordinates are left out"):
        report = load_masks(run, base, strict=False).report
    with ckptdiff.RunFile(run) as file:
        counts = {name: mask.count for name, mask in file.masks.items()}
    assert report.left_out == sum(counts[name] for name in report.unused_masks) > 0
    assert report.coordinates == sum(counts.values())


@pytest.mark.parametrize("names", ["base", "tuned"])
def test_masks_of_what_the_tuned_side_has_in_part(names: str, tmp_path: Path) -> None:
    """They have the shape of the base's tensor, and nothing where there was nothing to compare."""
    base, tuned = build("qwen3_moe"), build("qwen3_moe")
    moved(tuned, 1)
    base.save_pretrained(tmp_path / "base", save_original_format=False)
    tuned.save_pretrained(tmp_path / "tuned")
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    gone = "model.layers.1.mlp.experts.2.up_proj.weight"
    del tensors[gone]
    save_file(tensors, tmp_path / "tuned" / "model.safetensors")
    run = compared(tmp_path)
    fused = "model.layers.1.mlp.experts.gate_up_proj"
    expected = (base.get_parameter(fused) != tuned.get_parameter(fused)).numpy()
    expected[2, expected.shape[1] // 2 :] = False
    if names == "base":
        masks = load_masks(run, base)
        assert masks.report.complete and np.array_equal(masks[base.get_parameter(fused)].dense(), expected)
        return
    single = Holder(tensors)
    masks = load_masks(run, single, names=names)
    assert masks.report.complete and masks.count == sum(mask.count for mask in load_masks(run, base).values())
    # A model that has the expert has no mask for it.
    with pytest.raises(MaskError, match="do not match") as caught:
        load_masks(run, Holder(tensors | {gone: torch.zeros(24, 32)}), names=names)
    assert gone in str(caught.value.found)
    # Of a mask that is whole, a model without the expert has no place for a part.
    tuned.save_pretrained(tmp_path / "fused", save_original_format=False)
    whole = compared(tmp_path, tuned="fused")
    with pytest.raises(MaskError, match="do not match") as caught:
        load_masks(whole, single)
    assert fused in str(caught.value.found) and "tuned has no up of expert 2" in str(caught.value.found)


def test_training_moves_masked_coordinates_of_experts_only(tmp_path: Path) -> None:
    base, _ = saved("qwen3_moe", tmp_path)
    masks = load_masks(compared(tmp_path), base)
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    optimizer = MaskedSGD(base.parameters(), masks, lr=0.5)
    base(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    optimizer.step()
    for name, parameter in base.named_parameters():
        outside = ~torch.from_numpy(masks[parameter].dense())
        assert torch.equal(parameter[outside], before[name][outside])
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 4 and not any(torch.equal(before[name], base.get_parameter(name)) for name in experts)


def test_what_peft_wraps_around_fused_experts_is_no_obstacle(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, tuned = saved("qwen3_moe", tmp_path)
    expected = {name: (p != tuned.get_parameter(name)).numpy() for name, p in base.named_parameters()}
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    wrapped = peft.get_peft_model(base, config)
    for parameter in wrapped.parameters():
        parameter.requires_grad_(True)
    with pytest.warns(UserWarning, match="lora_A"):
        masks = load_masks(compared(tmp_path), wrapped, strict=False)
    found = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): masks[parameter].dense()
        for name, parameter in wrapped.named_parameters()
        if parameter in masks
    }
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("rows", [(10, 14), (14, 10)])
def test_rows_of_a_vocabulary(rows: tuple[int, int], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(max(rows), 5, generator=generator)
    sides = whole[: rows[0]], (whole + 0.5 * (torch.rand(whole.shape, generator=generator) < 0.5))[: rows[1]]
    for side, table in zip(("base", "tuned"), sides, strict=True):
        (tmp_path / side).mkdir()
        save_file({"model.embed_tokens.weight": table.contiguous()}, tmp_path / side / "model.safetensors")
    run = compared(tmp_path)
    changed = (sides[0][:10] != sides[1][:10]).numpy()
    for size in (10, 12, 14, 20):
        model = Holder({"model.embed_tokens.weight": torch.zeros(size, 5)})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            masks = load_masks(run, model)
        (mask,) = masks.values()
        assert np.array_equal(mask.dense()[:10], changed) and not mask.dense()[10:].any()
        assert any("rows" in told for told in masks.report.warnings) == (size > rows[0])
    with pytest.raises(MaskError, match="does not fit") as caught:
        load_masks(run, Holder({"model.embed_tokens.weight": torch.zeros(9, 5)}))
    assert caught.value.tensor == "model.embed_tokens.weight" and "10 rows" in str(caught.value.expected)


def test_decoded_values_are_trained_only_where_a_parameter_holds_them(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    codes = (torch.randn(128, 128, generator=torch.Generator().manual_seed(0)) * 8).to(torch.float8_e4m3fn)
    for side, scale in (("base", 0.5), ("tuned", 0.25)):
        (tmp_path / side).mkdir()
        tensors = {name: codes, f"{name}_scale_inv": torch.full((1, 1), scale)}
        save_file(tensors, tmp_path / side / "model.safetensors")
    run = compared(tmp_path)
    dense = Holder({name: torch.zeros(128, 128, dtype=torch.bfloat16)})
    assert load_masks(run, dense).count == (codes.float() != 0).sum()
    for kind in (torch.float8_e4m3fn, torch.uint8):
        with pytest.raises(MaskError, match="decoded values") as caught:
            load_masks(run, Holder({name: torch.zeros(128, 128).to(kind)}))
        assert caught.value.tensor == name and name in str(caught.value.expected) and str(kind) in caught.value.found
    other = Holder({f"{name}_packed": torch.zeros(128, 64).to(torch.uint8), "norm.weight": torch.ones(3)})
    with pytest.raises(MaskError, match="dequantised"):
        load_masks(run, other)


def test_the_callback_logs_what_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("transformers")
    from ckptdiff.retrain import MaskCallback

    base, _ = saved("qwen3_moe", tmp_path)
    run = compared(tmp_path)
    del base.model.layers[0]
    callback = MaskCallback(run, strict=False)
    with caplog.at_level("INFO", "ckptdiff.retrain"):
        callback.on_train_begin(None, None, None, model=base, optimizer=torch.optim.SGD(base.parameters()))
    callback.remove()
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "masks' coordinates are left out" in record.getMessage()


@given(st.data())
def test_a_piece_goes_where_numpy_puts_it(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    transposed = len(counts) > 1 and data.draw(st.booleans())
    there = [*counts[:-2], *counts[:-3:-1]] if transposed else counts
    index, shapes = [], []
    for sizes in (counts, there):
        ranges, shape = [], []
        for size in sizes:
            start, step, more = (data.draw(st.integers(low, 3)) for low in (0, 1, 0))
            ranges.append((start, start + (size - 1) * step + 1, step))
            shape.append(ranges[-1][1] + more)
        if data.draw(st.booleans()):
            ranges.insert(0, (2, 3, 1))
            shape.insert(0, 4)
        index.append(tuple(ranges))
        shapes.append(tuple(shape))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    ours, theirs = (rng.random(shape) < 0.5 for shape in shapes)
    box = ours[tuple(itertools.starmap(slice, index[0]))].reshape(counts)
    target = theirs[tuple(itertools.starmap(slice, index[1]))]
    expected = theirs.copy()
    expected[tuple(itertools.starmap(slice, index[1]))] |= (box.swapaxes(-1, -2) if transposed else box).reshape(
        target.shape
    )
    source = TensorInfo("p", "U8", shapes[1], Shard("", 0, 0, 0, 0, "", {}), 0, 0)
    out = np.packbits(theirs, bitorder="little")
    piece = Piece(source, index[0], index[1], transposed)
    assert place(np.packbits(ours, bitorder="little"), shapes[0], piece, out) == math.prod(counts)
    assert np.array_equal(np.unpackbits(out, count=theirs.size, bitorder="little").reshape(theirs.shape), expected)
