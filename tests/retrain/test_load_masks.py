"""Masks find their parameters, whatever a model is wrapped in; what does not fit is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import dense_by_h5py

import ckptdiff
from ckptdiff.errors import MaskError, OptionError, RunFileError
from ckptdiff.retrain import ParameterMasks, load_masks


def assert_masked(masks: ParameterMasks, model: torch.nn.Module, run_file: Path) -> None:
    """Each parameter of the unwrapped model has the mask of its name."""
    expected = dict(model.named_parameters())
    assert set(masks) == set(expected.values())
    for name, parameter in expected.items():
        assert np.array_equal(masks[parameter].dense(), dense_by_h5py(run_file, name))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_plain_model(run_file: Path, make_model: Callable) -> None:
    model = make_model()
    masks = load_masks(run_file, model)
    assert_masked(masks, model, run_file)
    assert masks.report.complete
    assert masks.report.buffers == ("position_ids",)
    assert 0.2 < masks.density < 0.4
    assert masks.count == sum(dense_by_h5py(run_file, name).sum() for name, _ in model.named_parameters())


def test_an_open_run_file_serves_many_models(run_file: Path, make_model: Callable) -> None:
    with ckptdiff.RunFile(run_file) as run:
        assert len(load_masks(run, make_model())) == len(load_masks(run, make_model(1)))


def test_a_model_inside_compile_and_data_parallel(run_file: Path, make_model: Callable, process_group: None) -> None:
    model = make_model()
    wrapped = torch.nn.parallel.DistributedDataParallel(torch.compile(model))
    assert all(name.startswith("module._orig_mod.") for name, _ in wrapped.named_parameters())
    assert_masked(load_masks(run_file, wrapped), model, run_file)


def test_a_model_whose_parts_are_wrapped(run_file: Path, make_model: Callable) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = make_model()
    model.layers[1] = checkpoint_wrapper(model.layers[1])
    outer = torch.nn.Module()
    outer._fsdp_wrapped_module = model
    assert "_fsdp_wrapped_module.layers.1._checkpoint_wrapped_module.up_proj.weight" in dict(outer.named_parameters())
    masks = load_masks(run_file, outer)
    model.layers[1] = model.layers[1]._checkpoint_wrapped_module
    assert_masked(masks, model, run_file)


def test_a_fully_sharded_model_before_it_is_sharded(run_file: Path, make_model: Callable, process_group: None) -> None:
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    masks = load_masks(run_file, model)
    assert_masked(masks, model, run_file)
    fully_shard(model)
    # The parameters are others now, of the same names and whole shapes.
    assert_masked(load_masks(run_file, model), model, run_file)


def test_a_peft_model(run_file: Path, make_model: Callable) -> None:
    peft = pytest.importorskip("peft")
    model = make_model()
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["lm_head"])
    wrapped = peft.get_peft_model(model, config)
    masks = load_masks(run_file, wrapped, strict=False)
    names = dict(wrapped.named_parameters())
    up = names["base_model.model.layers.0.up_proj.base_layer.weight"]
    head = names["base_model.model.lm_head.modules_to_save.default.weight"]
    assert np.array_equal(masks[up].dense(), dense_by_h5py(run_file, "layers.0.up_proj.weight"))
    assert np.array_equal(masks[head].dense(), dense_by_h5py(run_file, "lm_head.weight"))
    assert not masks.report.unused_masks
    assert len(masks.report.unmasked_parameters) == 4
    assert all("lora_" in name for name in masks.report.unmasked_parameters)


def test_each_copy_of_a_module_that_peft_saves_has_its_mask(run_file: Path, make_model: Callable) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["lm_head"])
    wrapped = peft.get_peft_model(make_model(), config)
    wrapped.add_adapter("second", config)
    for active in ("default", "second"):
        wrapped.set_adapter(active)
        masks = load_masks(run_file, wrapped, strict=False)
        names = dict(wrapped.named_parameters())
        for adapter in ("default", "second"):
            head = names[f"base_model.model.lm_head.modules_to_save.{adapter}.weight"]
            assert np.array_equal(masks[head].dense(), dense_by_h5py(run_file, "lm_head.weight"))
        assert "lm_head.weight" not in masks.report.frozen
        assert masks.report.matched["lm_head.weight"] == f"base_model.model.lm_head.modules_to_save.{active}.weight"


def test_masks_of_what_peft_freezes_are_said(run_file: Path, make_model: Callable) -> None:
    peft = pytest.importorskip("peft")
    model = make_model()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(MaskError, match="no masked parameter is trained") as caught:
        load_masks(run_file, wrapped, strict=False)
    assert "do not require a gradient" in caught.value.found
    model.norm.weight.requires_grad_(True)
    frozen = load_masks(run_file, wrapped, strict=False).report.frozen
    assert set(frozen) == {name for name, _ in make_model().named_parameters()} - {"norm.weight"}


def test_a_name_that_looks_like_pefts_matches_exactly(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.inner = torch.nn.Module()
    model.inner.base_layer = torch.nn.Linear(4, 3)
    model.inner.original_module = torch.nn.Linear(3, 2)
    tensors = dict(model.state_dict())
    save_file(tensors, tmp_path / "base.safetensors")
    save_file({name: value + 1 for name, value in tensors.items()}, tmp_path / "tuned.safetensors")
    ckptdiff.diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", out=tmp_path / "run.h5")
    for wrapped in (model, torch.compile(model)):
        masks = load_masks(tmp_path / "run.h5", wrapped)
        assert set(masks) == set(model.parameters())


def test_a_run_with_renames_serves_models_of_either_side(run_file: Path, make_model: Callable, tmp_path: Path) -> None:
    """Also where the tuned side has the names of other tensors of the base."""
    tuned = load_file(run_file.parent / "tuned" / "model.safetensors")
    swapped = {name.replace("layers.", "blocks.").replace("blocks.0", "blocks.9"): v for name, v in tuned.items()}
    swapped = {name.replace("blocks.1", "layers.0").replace("blocks.9", "layers.1"): v for name, v in swapped.items()}
    save_file(swapped, tmp_path / "tuned.safetensors")
    ckptdiff.diff(
        run_file.parent / "base",
        tmp_path / "tuned.safetensors",
        out=tmp_path / "run.h5",
        mask="bitwise",
        renames=(r"layers\.0=layers.x", r"layers\.1=layers.0", r"layers\.x=layers.1"),
    )
    model = make_model()
    assert_masked(load_masks(tmp_path / "run.h5", model), model, run_file)
    masks = load_masks(tmp_path / "run.h5", model, names="tuned")
    for name, parameter in model.named_parameters():
        other = {"layers.0": "layers.1", "layers.1": "layers.0"}.get(name[:8], name[:8]) + name[8:]
        assert np.array_equal(masks[parameter].dense(), dense_by_h5py(run_file, other))
    with pytest.raises(OptionError, match="unknown side"):
        load_masks(tmp_path / "run.h5", model, names="left")


def test_what_is_drawn_and_chosen_does_not_depend_on_wrappers(run_file: Path, make_model: Callable) -> None:
    model = make_model()
    plain, compiled = load_masks(run_file, model), load_masks(run_file, torch.compile(model))
    assert compiled.names == plain.names
    for parameter, mask in plain.random(3).items():
        assert np.array_equal(compiled.random(3)[parameter].bits, mask.bits)
    assert set(compiled.only("layers.0.*")) == set(model.layers[0].parameters())


@pytest.mark.parametrize("stored", ["embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_are_found_by_either_name(stored: str, tmp_path: Path, make_model: Callable) -> None:
    model = make_model(tied=True)
    tensors = {name: value.clone() for name, value in model.state_dict().items() if name != "position_ids"}
    del tensors["lm_head.weight" if stored == "embed_tokens.weight" else "embed_tokens.weight"]
    save_file(tensors, tmp_path / "base.safetensors")
    save_file({name: value + 0.5 for name, value in tensors.items()}, tmp_path / "tuned.safetensors")
    ckptdiff.diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", out=tmp_path / "run.h5")
    masks = load_masks(tmp_path / "run.h5", model)
    assert masks.report.matched[stored] == stored
    assert masks[model.embed_tokens.weight].count == model.embed_tokens.weight.numel()
    assert masks.names[model.lm_head.weight] == stored


def test_two_masks_for_one_tied_parameter_must_agree(run_file: Path, make_model: Callable) -> None:
    with pytest.raises(MaskError, match="tied parameter"):
        load_masks(run_file, make_model(tied=True))


def test_shapes_that_differ_are_named(run_file: Path, make_model: Callable) -> None:
    wrapped = torch.nn.Module()
    wrapped.module = make_model(width=32)
    with pytest.raises(MaskError) as caught:
        load_masks(run_file, wrapped)
    assert caught.value.tensor == "embed_tokens.weight"
    assert "(24, 32) of module.embed_tokens.weight" in caught.value.expected
    assert "(24, 16)" in caught.value.found


def test_what_does_not_match_is_refused_or_reported(run_file: Path, make_model: Callable) -> None:
    model = make_model()
    del model.layers[1]
    model.extra = torch.nn.Linear(2, 2)
    model.still = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    with pytest.raises(MaskError, match="do not match") as caught:
        load_masks(run_file, model)
    assert "layers.1.up_proj.weight" in caught.value.found
    assert "extra.weight" in caught.value.found
    report = load_masks(run_file, model, strict=False).report
    assert report.unmasked_parameters == ("extra.weight", "extra.bias")
    assert set(report.unused_masks) == {
        f"layers.1.{name}" for name in ("up_proj.weight", "down_proj.weight", "down_proj.bias")
    }
    assert "3 masks without a parameter: layers.1" in str(report)
    with pytest.raises(MaskError, match="no mask of the run file fits"):
        load_masks(run_file, torch.nn.Sequential(torch.nn.Linear(16, 24)), strict=False)


def test_a_run_in_which_nothing_moved_has_nothing_to_train(
    tmp_path: Path, run_file: Path, make_model: Callable
) -> None:
    base = run_file.parent / "base"
    ckptdiff.diff(base, base, out=tmp_path / "same.h5")
    with pytest.raises(MaskError, match="nothing to train"):
        load_masks(tmp_path / "same.h5", make_model())
    ckptdiff.diff(base, run_file.parent / "tuned", out=tmp_path / "none.h5", mask="none")
    with pytest.raises(RunFileError, match="holds no masks"):
        load_masks(tmp_path / "none.h5", make_model())


def test_a_parameter_that_never_moves_is_fine(tmp_path: Path, run_file: Path, make_model: Callable) -> None:
    tensors = load_file(run_file.parent / "base" / "model.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"] + 1
    save_file(tensors, tmp_path / "tuned.safetensors")
    ckptdiff.diff(run_file.parent / "base", tmp_path / "tuned.safetensors", out=tmp_path / "run.h5")
    masks = load_masks(tmp_path / "run.h5", make_model())
    assert masks.report.complete
    assert masks.count == 16


@pytest.mark.parametrize("kind", ["absent", "text", "foreign", "incomplete", "cut"])
def test_files_that_are_no_whole_run_files(kind: str, tmp_path: Path, run_file: Path, make_model: Callable) -> None:
    path = tmp_path / "run.h5"
    if kind == "text":
        path.write_text("masks")
    elif kind == "cut":
        path.write_bytes(run_file.read_bytes()[:9000])
    elif kind != "absent":
        path.write_bytes(run_file.read_bytes())
        with h5py.File(path, "r+") as file:
            if kind == "foreign":
                del file.attrs["format"]
            else:
                file.attrs["complete"] = 0
    with pytest.raises(RunFileError) as caught:
        load_masks(path, make_model())
    assert caught.value.file == str(path)


def test_masks_combine_by_parameter(run_file: Path, make_model: Callable) -> None:
    model = make_model()
    masks = load_masks(run_file, model)
    drawn, rest = masks.random(7), masks.inverted()
    for parameter, mask in masks.items():
        dense = mask.dense()
        assert drawn[parameter].count == mask.count
        assert np.array_equal(rest[parameter].dense(), ~dense)
        assert np.array_equal((masks | drawn)[parameter].dense(), dense | drawn[parameter].dense())
        assert np.array_equal((masks & drawn)[parameter].dense(), dense & drawn[parameter].dense())
        assert np.array_equal((masks - drawn)[parameter].dense(), dense & ~drawn[parameter].dense())
    assert (masks | rest).density == 1
    assert [mask.count for mask in masks.random(7).values()] == [mask.count for mask in drawn.values()]
    assert any(
        not np.array_equal(a.bits, b.bits) for a, b in zip(masks.random(8).values(), drawn.values(), strict=True)
    )
    ffn = masks.only("*.up_proj.weight", "*.down_proj.*")
    assert sorted(ffn.names.values()) == sorted(name for name, _ in model.named_parameters() if "_proj" in name)
    head = masks.only("lm_head.weight")
    assert set(ffn | head) == {*ffn, *head}
    assert not set(ffn & head)
    assert set(ffn - head) == set(ffn)
    with pytest.raises(MaskError, match="of that name"):
        masks.only("mlp")
