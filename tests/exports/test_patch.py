"""Patches are read by safetensors and applied with torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckptdiff
from ckptdiff.cli import main
from ckptdiff.errors import CheckpointError, OptionError, RunFileError
from ckptdiff.exports.patch import export_patch, missing_from_patch


def patched(base: Path, patch: Path) -> dict[str, torch.Tensor]:
    tensors, changes = load_file(base), load_file(patch)
    for name in changes:
        if name.endswith(".indices"):
            flat = tensors[name.removesuffix(".indices")].view(-1)
            flat[changes[name].long()] = changes[name.replace(".indices", ".values")]
    return tensors


def test_a_patch_of_all_changes_makes_the_tuned_checkpoint_of_the_base(
    sides: tuple[Path, Path], make_run: Callable, tmp_path: Path
) -> None:
    target = tmp_path / "patch.safetensors"
    with ckptdiff.RunFile(make_run(mask="bitwise", compare="stored")) as run:
        count = export_patch(run, target)
    base, tuned = map(load_file, sides)
    found = patched(sides[0], target)
    assert all(torch.equal(found[name], tuned[name]) for name in tuned)
    assert count == sum(not torch.equal(base[name], tuned[name]) for name in tuned)
    changed = sum((base[name] != tuned[name]).sum().item() for name in tuned)
    assert sum(values.numel() for name, values in load_file(target).items() if name.endswith(".indices")) == changed
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "ckptdiff-patch"
    assert metadata["rule"] == "bitwise"
    assert json.loads(metadata["tuned"])[0]["file"] == "tuned.safetensors"
    assert json.loads(metadata["shapes"])["model.norm.weight"] == [24]


def test_a_patch_of_a_mask_holds_the_masked_coordinates(
    sides: tuple[Path, Path], make_run: Callable, tmp_path: Path
) -> None:
    target = tmp_path / "patch.safetensors"
    name = "model.layers.0.mlp.up_proj.weight"
    with ckptdiff.RunFile(make_run(mask="top:10")) as run:
        assert export_patch(run, target, names=["*.up_proj.*"]) == 1
        mask = torch.from_numpy(run.masks[name].dense())
    found, base, tuned = patched(sides[0], target)[name], load_file(sides[0])[name], load_file(sides[1])[name]
    assert mask.sum() == 96
    assert torch.equal(found, torch.where(mask, tuned, base))


def test_tensors_of_several_blocks(tmp_path: Path) -> None:
    base = torch.zeros((1 << 20) + 5, 2).bfloat16()
    tuned = base.clone()
    tuned.view(-1)[torch.tensor([0, 1 << 20, (1 << 20) - 1, 2 * (1 << 20) + 9])] = torch.arange(4).bfloat16() + 1
    for side, tensor in (("base", base), ("tuned", tuned)):
        save_file({"w": tensor}, tmp_path / f"{side}.safetensors")
    ckptdiff.diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", out=tmp_path / "run.h5")
    with ckptdiff.RunFile(tmp_path / "run.h5") as run:
        export_patch(run, tmp_path / "patch.safetensors")
    assert torch.equal(patched(tmp_path / "base.safetensors", tmp_path / "patch.safetensors")["w"], tuned)


def test_the_tuned_checkpoint_may_have_moved_but_not_changed(
    sides: tuple[Path, Path], make_run: Callable, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere.safetensors"
    shutil.copy(sides[1], moved)
    with ckptdiff.RunFile(make_run()) as run:
        export_patch(run, tmp_path / "patch.safetensors", tuned=moved)
        export_patch(run, tmp_path / "patch.safetensors", tuned=moved)  # a patch may be replaced
        save_file({"other": torch.zeros(3)}, moved)
        with pytest.raises(CheckpointError, match="not the tuned checkpoint"):
            export_patch(run, tmp_path / "patch.safetensors", tuned=moved)
        with pytest.raises(CheckpointError) as caught:
            export_patch(run, tmp_path / "patch.safetensors", tuned=tmp_path / "nowhere")
    assert caught.value.hint
    assert patched(sides[0], tmp_path / "patch.safetensors")


@pytest.mark.parametrize("compare", ["bf16", "stored"])
def test_another_step_of_the_same_run_is_refused(
    compare: str, sides: tuple[Path, Path], make_run: Callable, tmp_path: Path
) -> None:
    tensors = load_file(sides[1])
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1.01
    save_file(tensors, tmp_path / "later.safetensors")
    refused = pytest.raises(CheckpointError, match=r"not the tuned checkpoint .* other values")
    with ckptdiff.RunFile(make_run(mask="bitwise", compare=compare)) as run, refused as caught:
        export_patch(run, tmp_path / "patch.safetensors", tuned=tmp_path / "later.safetensors")
    assert caught.value.tensor == "model.layers.0.mlp.down_proj.weight"
    assert "--tuned" in str(caught.value.hint)
    assert [path.name for path in tmp_path.iterdir()] == ["later.safetensors"]


def test_a_checkpoint_that_was_modified_since_is_refused(make_run: Callable, tmp_path: Path) -> None:
    for side in ("base", "tuned"):
        save_file({"w": torch.zeros(3)}, tmp_path / f"{side}.safetensors")
    ckptdiff.diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", out=tmp_path / "run.h5")
    save_file({"w": torch.ones(3)}, tmp_path / "tuned.safetensors")
    with ckptdiff.RunFile(tmp_path / "run.h5") as run, pytest.raises(CheckpointError, match="not the tuned"):
        export_patch(run, tmp_path / "patch.safetensors")
    assert not (tmp_path / "patch.safetensors").exists()


def test_what_cannot_be_written_is_refused(make_run: Callable, tmp_path: Path) -> None:
    with ckptdiff.RunFile(make_run()) as run:
        with pytest.raises(OptionError, match="format of a patch"):
            export_patch(run, tmp_path / "patch.npz")
        with pytest.raises(OptionError, match="no mask of that name"):
            export_patch(run, tmp_path / "patch.safetensors", names=["nothing"])
        (tmp_path / "patch.safetensors").write_text("precious")
        with pytest.raises(RunFileError, match="no patch"):
            export_patch(run, tmp_path / "patch.safetensors")
    assert (tmp_path / "patch.safetensors").read_text() == "precious"
    with ckptdiff.RunFile(make_run(mask="none")) as run, pytest.raises(RunFileError, match="holds no masks"):
        export_patch(run, tmp_path / "other.safetensors")


def test_what_a_patch_leaves_out_is_said(
    sides: tuple[Path, Path], make_run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = map(load_file, sides)
    for rule, compare in (("bitwise", "stored"), ("abs:1e-3", "stored"), ("top:10", "bf16")):
        with ckptdiff.RunFile(make_run(mask=rule, compare=compare)) as run:
            path, masked = run.path, {name: torch.from_numpy(run.masks[name].dense()) for name in run.masks}
        left = sum(((base[name] != tuned[name]) & ~mask).sum().item() for name, mask in masked.items())
        assert (left == 0) == (rule == "bitwise")
        with ckptdiff.RunFile(path) as run:
            assert missing_from_patch(run) == (left, 0, 0)
        capsys.readouterr()
        assert main(["mask", "export", path, "-o", str(tmp_path / "p.safetensors"), "--layout", "patch"]) == 0
        assert ("values changed but are not in the patch" in capsys.readouterr().err) == (left > 0)


def test_tensors_that_no_patch_can_make_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = torch.ones(4, 4)
    save_file({"a": shared, "b": torch.ones(3)}, tmp_path / "base.safetensors")
    save_file({"a": shared * 2, "b": torch.ones(4), "c": shared}, tmp_path / "tuned.safetensors")
    run = tmp_path / "run.h5"
    ckptdiff.diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", out=run)
    assert main(["mask", "export", str(run), "-o", str(tmp_path / "p.safetensors"), "--layout", "patch"]) == 0
    assert "2 tensors of the tuned checkpoint without a counterpart" in capsys.readouterr().err
