"""Heads and embeddings that one side stores in another way: more rows, or a head of its own where the other ties it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckptdiff
from ckptdiff import RunFile
from ckptdiff.cli import main

EMBED, HEAD, UP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"


def moved(values: np.ndarray, share: float, seed: int = 1) -> np.ndarray:
    """Bfloat16 codes with a share of them one step on."""
    flat = values.reshape(-1).copy()
    chosen = np.random.default_rng(seed).choice(flat.size, round(share * flat.size), replace=False)
    flat[chosen] ^= 1
    return flat.reshape(values.shape)


def matrix(*shape: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def write(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] | None = None) -> Path:
    """Bfloat16 tensors, as a folder with a config.json."""
    import torch
    from safetensors.torch import save_file as save

    folder.mkdir()
    save(
        {name: torch.from_numpy(codes.view(np.int16)).view(torch.bfloat16) for name, codes in tensors.items()},
        folder / "model.safetensors",
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def row_of(diff: ckptdiff.Diff, name: str) -> dict[str, Any]:
    from ckptdiff.report.as_json import document

    (found,) = (row for row in document(diff)["tensors"] if row["name"] == name)
    return found


@pytest.mark.parametrize("grown", ["tuned", "base"])
def test_the_common_rows_of_a_grown_vocabulary_are_compared(grown: str, tmp_path: Path) -> None:
    small, up = matrix(128, 64), matrix(64, 64, seed=3)
    large = np.concatenate([moved(small, 0.25), matrix(8, 64, seed=9)])
    sides = {"base": small, "tuned": large} if grown == "tuned" else {"base": large, "tuned": small}
    base, tuned = (write(tmp_path / side, {EMBED: codes, UP: up}) for side, codes in sides.items())
    diff = ckptdiff.diff(base, tuned, out=tmp_path / "run.h5", mask="bitwise")
    row = row_of(diff, EMBED)
    only = {"base": "only_in_base", "tuned": "only_in_tuned"}[grown]
    assert row["rows"] == {"compared": 128, "only_in_base": 0, "only_in_tuned": 0, only: 8}
    assert row["shape"] == list(sides["base"].shape) and row["numel"] == 128 * 64
    assert row["unchanged_bitwise"] == 0.75
    assert not diff.identical
    coverage = diff.coverage
    assert coverage["base"].compared == coverage["tuned"].compared == (128 + 64) * 64
    assert coverage[grown].values == (136 + 64) * 64
    with RunFile(tmp_path / "run.h5") as run:
        assert run.load().tensors == diff.tensors
        mask = run.masks[EMBED].dense()
    assert mask.shape == sides["base"].shape
    np.testing.assert_array_equal(mask[:128], sides["base"][:128] != sides["tuned"][:128])
    assert not mask[128:].any()


def test_masks_of_many_more_rows_are_whole(tmp_path: Path) -> None:
    large = matrix(40_000, 64)
    base, tuned = write(tmp_path / "base", {EMBED: large}), write(tmp_path / "tuned", {EMBED: moved(large[:100], 0.5)})
    ckptdiff.diff(base, tuned, out=tmp_path / "run.h5", mask="bitwise")
    with RunFile(tmp_path / "run.h5") as run:
        flat = run.masks[EMBED].flat()
        assert run.masks[EMBED].shape == (40_000, 64)
    np.testing.assert_array_equal(flat, np.flatnonzero(large[:100] != moved(large[:100], 0.5)))


def test_rows_alone_make_two_checkpoints_differ(tmp_path: Path) -> None:
    small = matrix(16, 8)
    base = write(tmp_path / "base", {EMBED: small})
    tuned = write(tmp_path / "tuned", {EMBED: np.concatenate([small, small[:2]])})
    assert main(["diff", str(base), str(tuned), "-q"]) == 1


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    "config", [TIED, {"text_config": TIED}, {"model_type": "gemma3"}, {"text_config": {"model_type": "gemma2"}}]
)
@pytest.mark.parametrize("stores", ["base", "tuned"])
def test_a_head_is_compared_with_the_embedding_that_it_left(
    stores: str, config: dict[str, Any], tmp_path: Path
) -> None:
    embedding, up = matrix(96, 32), matrix(32, 32, seed=3)
    head = moved(embedding, 0.3125)
    folders = {}
    for side in ("base", "tuned"):
        own = {HEAD: head} if side == stores else {}
        folders[side] = write(tmp_path / side, {EMBED: embedding, UP: up, **own}, {} if side == stores else config)
    diff = ckptdiff.diff(folders["base"], folders["tuned"], out=tmp_path / "run.h5", mask="bitwise")
    row = row_of(diff, HEAD)
    assert row["untied"] is True and row["unchanged_bitwise"] == 0.6875 and row["numel"] == 96 * 32
    assert diff.overall["unchanged_bitwise"] == pytest.approx(1 - 0.3125 * 96 / (96 + 96 + 32))
    assert not diff.identical and diff.counts["only_in_base"] == diff.counts["only_in_tuned"] == 0
    assert all(found.share == 1 for found in diff.coverage.values())
    with RunFile(tmp_path / "run.h5") as run:
        assert run.load().tensors == diff.tensors
        np.testing.assert_array_equal(run.masks[HEAD].dense(), head != embedding)


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        {"tie_word_embeddings": False},
        {"model_type": "llama"},
        {"tie_word_embeddings": False, "model_type": "gemma3"},
        {"model_type": ["gemma3"]},
    ],
)
def test_without_a_tie_a_head_is_only_in_one_side(config: dict[str, Any] | None, tmp_path: Path) -> None:
    embedding = matrix(96, 32)
    base = write(tmp_path / "base", {EMBED: embedding, HEAD: moved(embedding, 0.5)}, {})
    tuned = write(tmp_path / "tuned", {EMBED: embedding}, config)
    diff = ckptdiff.diff(base, tuned)
    assert diff.only_in_base == (HEAD,) and not diff.identical
    assert main(["diff", str(base), str(tuned), "-q"]) == 1


def test_a_head_equal_to_its_embedding_is_an_alias_whatever_the_other_side_says(tmp_path: Path) -> None:
    embedding = matrix(96, 32)
    base = write(tmp_path / "base", {EMBED: embedding}, TIED)
    tuned = write(tmp_path / "tuned", {EMBED: moved(embedding, 0.5), HEAD: moved(embedding, 0.5)}, {})
    diff = ckptdiff.diff(base, tuned)
    assert [facts.name for facts in diff.tensors] == [EMBED] and diff.aliased == ((HEAD, EMBED),)


def test_a_patch_of_an_untied_head_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embedding = matrix(96, 32)
    base = write(tmp_path / "base", {EMBED: embedding}, TIED)
    tuned = write(tmp_path / "tuned", {EMBED: embedding, HEAD: moved(embedding, 0.5)}, {})
    ckptdiff.diff(base, tuned, out=tmp_path / "run.h5", mask="bitwise")
    assert (
        main(["mask", "export", str(tmp_path / "run.h5"), "-o", str(tmp_path / "p.safetensors"), "--layout", "patch"])
        == 2
    )
    assert HEAD in capsys.readouterr().err and not (tmp_path / "p.safetensors").exists()


@pytest.mark.slow
def test_model_types_that_tie_by_default_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from ckptdiff.checkpoint.tied_models import TIED_BY_DEFAULT

    tied, known = set(), set()
    for name, kind in transformers.CONFIG_MAPPING.items():
        try:
            config = kind()
        except Exception:  # made of models that have to be named, in whatever way it says so
            continue
        known.add(name)
        if getattr(config, "tie_word_embeddings", False):
            tied.add(name)
    assert len(known) > 300
    assert tied == TIED_BY_DEFAULT & known


@pytest.mark.parametrize("grown", ["base", "tuned"])
@pytest.mark.parametrize("stores", ["base", "tuned"])
def test_a_head_of_a_grown_vocabulary_is_compared_with_the_embedding_that_it_left(
    stores: str, grown: str, tmp_path: Path
) -> None:
    small = matrix(96, 32)
    large = np.concatenate([small, matrix(8, 32, seed=9)])
    embeddings = {side: large if side == grown else small for side in ("base", "tuned")}
    head = moved(embeddings[stores], 0.25)
    folders = [
        write(
            tmp_path / side,
            {EMBED: embedding, **({HEAD: head} if side == stores else {})},
            {} if side == stores else TIED,
        )
        for side, embedding in embeddings.items()
    ]
    diff = ckptdiff.diff(*folders, out=tmp_path / "run.h5", mask="bitwise")
    row = row_of(diff, HEAD)
    other = embeddings["tuned" if stores == "base" else "base"]
    differs = head[:96] != other[:96]
    assert row["untied"] is True and row["unchanged_bitwise"] == 1 - differs.mean()
    assert row["shape"] == list(embeddings["base"].shape)
    assert row["rows"] == {
        "compared": 96,
        "only_in_base": 8 * (grown == "base"),
        "only_in_tuned": 8 * (grown == "tuned"),
    }
    for side, found in diff.coverage.items():
        heads = side == stores
        assert found.values == embeddings[side].size * (1 + heads) and found.compared == small.size * (1 + heads)
    with RunFile(tmp_path / "run.h5") as run:
        assert run.load().tensors == diff.tensors
        mask = run.masks[HEAD].dense()
    np.testing.assert_array_equal(mask[:96], differs)
    assert not mask[96:].any()
