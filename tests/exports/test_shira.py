"""Adapters are loaded by PEFT and do to the model what the export says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptdiff
from ckptdiff.errors import CheckpointError, OptionError, RunFileError
from ckptdiff.exports.shira import export_shira

NAMES = {
    "q_proj": "model.layers.0.self_attn.q_proj.weight",
    "up_proj": "model.layers.0.mlp.up_proj.weight",
    "down_proj": "model.layers.0.mlp.down_proj.weight",
}


def linear_model(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Linear layers of the checkpoint's names, nested as the names say, in float32."""
    root = torch.nn.Module()
    for name in NAMES.values():
        *path, last = name.removesuffix(".weight").split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        weight = tensors[name].float()
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = torch.nn.Parameter(weight.clone())
        parent.add_module(last, layer)
    root.forward = lambda x: x
    return root


def expected(base: torch.Tensor, tuned: torch.Tensor, rank: int) -> torch.Tensor:
    """The base with its largest changes applied, ties to the smaller index."""
    delta = (tuned.float() - base.float()).numpy().ravel()
    largest = np.argsort(-np.abs(delta), kind="stable")[: rank * sum(base.shape)]
    result = base.float().clone().view(-1)
    result[largest] += torch.from_numpy(delta[largest])
    return result.view(base.shape)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_peft_loads_the_adapter_and_merges_the_largest_changes(
    rank: int, sides: tuple[Path, Path], make_run: Callable, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    with ckptdiff.RunFile(make_run(mask="none")) as run:
        adapter = export_shira(run, tmp_path / "adapter", rank=rank)
    base, tuned = map(load_file, sides)
    model = peft.PeftModel.from_pretrained(linear_model(base), tmp_path / "adapter")
    merged = model.merge_and_unload()
    total = kept = 0.0
    for name in NAMES.values():
        wanted = expected(base[name], tuned[name], rank)
        assert torch.equal(merged.get_parameter(name), wanted)
        total += (tuned[name].double() - base[name].double()).square().sum().item()
        kept += (wanted.double() - base[name].double()).square().sum().item()
    assert adapter.layers == 3
    assert adapter.coordinates == rank * (48 + 64 + 64)
    assert adapter.energy == pytest.approx(kept / total, rel=1e-5)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == rank


def test_names_choose_layers(sides: tuple[Path, Path], make_run: Callable, tmp_path: Path) -> None:
    with ckptdiff.RunFile(make_run()) as run:
        assert export_shira(run, tmp_path / "a", rank=2, names=["*_proj.weight"]).layers == 3
        assert export_shira(run, tmp_path / "b", rank=2, names=["*.mlp.*"]).layers == 2
    assert len(load_file(tmp_path / "b" / "adapter_model.safetensors")) == 4


def test_what_is_no_linear_layer_to_peft_is_refused(tmp_path: Path) -> None:
    shapes = {"transformer.wte.weight": (50, 24), "transformer.h.0.attn.c_attn.weight": (24, 72)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "base.safetensors")
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "tuned.safetensors")
    ckptdiff.diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", out=tmp_path / "run.h5")
    with ckptdiff.RunFile(tmp_path / "run.h5") as run:
        for names, found in (["*.c_attn.*"], "Conv1D"), (["*.wte.*"], "an embedding"):
            with pytest.raises(OptionError, match="linear layers only") as caught:
                export_shira(run, tmp_path / "adapter", rank=1, names=names)
            assert found in str(caught.value.found)
        with pytest.raises(OptionError, match="no matrix that PEFT's SHiRA can adapt") as caught:
            export_shira(run, tmp_path / "adapter", rank=1)
        assert "an embedding" in str(caught.value.found) and "Conv1D" in str(caught.value.found)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_another_step_of_the_same_run_is_refused(
    side: str, sides: tuple[Path, Path], make_run: Callable, tmp_path: Path
) -> None:
    original = sides[side == "tuned"]
    other, copy = tmp_path / "other.safetensors", tmp_path / "copy.safetensors"
    tensors = load_file(original)
    save_file(tensors, copy)
    tensors[NAMES["up_proj"]][3, 3] += 1
    save_file(tensors, other)
    with ckptdiff.RunFile(make_run()) as run:
        export_shira(run, tmp_path / "adapter", rank=1, **{side: copy})
        with pytest.raises(CheckpointError, match=rf"not the {side} checkpoint .* other values") as caught:
            export_shira(run, tmp_path / "new", rank=1, **{side: other})
        assert caught.value.tensor == NAMES["up_proj"]
        assert not (tmp_path / "new").exists()
        assert export_shira(run, tmp_path / "others", rank=1, names=["*.q_proj.*"], **{side: other}).layers == 1


def test_what_no_adapter_can_hold_is_refused(make_run: Callable, tmp_path: Path) -> None:
    with ckptdiff.RunFile(make_run()) as run:
        for rank, names in (0, []), (-1, []), (99, []), (13, ["*.q_proj.*", "*.mlp.*"]):
            with pytest.raises(OptionError, match="rank cannot be met") as caught:
                export_shira(run, tmp_path / "a", rank=rank, names=names)
        assert "1 to 12" in caught.value.expected and caught.value.file == run.path
        made = export_shira(run, tmp_path / "some", rank=13)
        assert made.layers == 2 and {one.name: one.reason for one in made.left_out}[NAMES["q_proj"]].startswith("too")
        with pytest.raises(OptionError, match="no matrix of that name"):
            export_shira(run, tmp_path / "a", rank=1, names=["mlp"])
        for name in ("model.norm.weight", "position_ids"):
            with pytest.raises(OptionError, match="linear layers only") as caught:
                export_shira(run, tmp_path / "a", rank=1, names=[name])
            assert caught.value.tensor == name
        assert not (tmp_path / "a").exists()
        (tmp_path / "full").mkdir()
        with pytest.raises(RunFileError, match="the output exists"):
            export_shira(run, tmp_path / "full", rank=1)
        with pytest.raises(RunFileError, match="folder does not exist"):
            export_shira(run, tmp_path / "missing" / "a", rank=1)
    assert [path.name for path in tmp_path.iterdir() if "full" in path.name or path.suffix == ".tmp"] == ["full"]


def test_matrices_that_never_moved_are_refused(sides: tuple[Path, Path], tmp_path: Path) -> None:
    ckptdiff.diff(sides[0], sides[0], out=tmp_path / "run.h5")
    with ckptdiff.RunFile(tmp_path / "run.h5") as run, pytest.raises(OptionError, match="change nothing") as caught:
        export_shira(run, tmp_path / "adapter", rank=1)
    assert caught.value.file == str(tmp_path / "run.h5") and NAMES["q_proj"] in str(caught.value.found)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("writes", range(6))
def test_an_interrupt_leaves_no_part_of_an_adapter(
    writes: int, make_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(range(writes))
    pwrite = os.pwrite

    def interrupted(*args: Any) -> int:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return pwrite(*args)

    path = make_run()
    with ckptdiff.RunFile(path) as run:
        monkeypatch.setattr(os, "pwrite", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_shira(run, tmp_path / "adapter", rank=1)
    assert not [path for path in tmp_path.iterdir() if "adapter" in path.name]


def test_a_layer_of_several_blocks_and_ties(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    base = torch.zeros(2048, 1100)
    tuned = base.clone()
    tuned[:, 7] = 0.5
    tuned[2047, 1099] = 0.25
    tuned[1500, 3] = torch.nan
    tuned[1600, 3] = -0.75
    for side, tensor in (("base", base), ("tuned", tuned)):
        save_file({name: tensor}, tmp_path / f"{side}.safetensors")
    ckptdiff.diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", out=tmp_path / "run.h5", mask="none")
    with ckptdiff.RunFile(tmp_path / "run.h5") as run:
        export_shira(run, tmp_path / "a", rank=1)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    rows, columns = tensors["base_model.model.model.layers.0.mlp.up_proj.shira_indices"].long()
    found = torch.zeros_like(base)
    found[rows, columns] = tensors["base_model.model.model.layers.0.mlp.up_proj.shira_weight"]
    assert rows.numel() == 3148
    assert torch.equal(found, tuned.nan_to_num(0))
    flat = set((rows * 1100 + columns).tolist())
    filler = [index for index in range(3148) if index % 1100 != 7]
    assert set(filler[:1000]) <= flat  # what is left goes to the first coordinates that did not change
