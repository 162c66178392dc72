"""Models saved under old and new names of their library: the rules that are proposed pair what is one weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ckptdiff
from ckptdiff.checkpoint import open_checkpoint
from ckptdiff.checkpoint.matching import match_names
from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.checkpoint.same_values import sampled_agreement
from ckptdiff.checkpoint.suggested_map import suggest_map

from models import build  # isort: skip

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.mark.parametrize("family", ["detr", "dinov2", "gpt_neox", "nemotron_h", "segformer", "swin", "vit", "vit_mae"])
def test_old_names_against_new_ones(family: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    model = build(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path / "old")
    model.save_pretrained(tmp_path / "new", save_original_format=False)
    stored = {side: load_file(tmp_path / side / "model.safetensors") for side in ("old", "new")}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * (torch.rand_like(parameter) < 0.1))
    model.save_pretrained(tmp_path / "tuned", save_original_format=False)
    base, tuned = open_checkpoint(tmp_path / "old"), open_checkpoint(tmp_path / "tuned")
    # A run pairs them by the table of layouts; here nothing is known but names, shapes and values.
    matched, _ = match_names(base.tensors, tuned.tensors)
    alone = [name for name in base.tensors if name not in matched]
    theirs = [name for name in tuned.tensors if name not in matched.values()]
    with open_shards("pread") as shards:
        found = suggest_map(base, tuned, matched, alone, theirs, agreement=sampled_agreement(shards))
    assert found.rules and not found.undecided
    matched, _ = match_names(base.tensors, tuned.tensors, found.rules)
    # Experts stored one by one are no renaming of fused ones.
    assert {name for name in base.tensors if name not in matched} == {
        name for name in base.tensors if ".experts." in name
    }
    for name, other in matched.items():
        assert np.array_equal(stored["old"][name], stored["new"][other]), (name, other)


@pytest.mark.parametrize("family", ["qwen3_moe", "phi3"])
@pytest.mark.parametrize(("old", "new"), [("model.", "thinker.core."), ("model.layers.", "model.decoder.stack.")])
def test_a_rule_that_whole_tensors_tell_pairs_pieces_too(family: str, old: str, new: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = build(family)
    model.save_pretrained(tmp_path / "tuned", save_original_format=False)
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = {name.replace(old, new, 1): tensor for name, tensor in load_file(path).items()}
    if family == "phi3":  # which has q, k and v in one tensor
        for name in [name for name in tensors if ".qkv_proj." in name]:
            parts = tensors.pop(name).split([32, 16, 16])
            tensors |= {name.replace("qkv", letter): part.clone() for letter, part in zip("qkv", parts, strict=True)}
    save_file(tensors, path)
    found = ckptdiff.diff(tmp_path / "base", tmp_path / "tuned")
    assert found.coverage["base"].share < 0.5
    assert len(found.suggested_map) == 1
    again = ckptdiff.diff(tmp_path / "base", tmp_path / "tuned", renames=found.suggested_map)
    assert [coverage.share for coverage in again.coverage.values()] == [1, 1] and any(t.pieces for t in again.tensors)
