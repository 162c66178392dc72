"""Overlaps of runs whose sides are stored in other pieces, quantised, or with other rows."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import ckptdiff
from ckptdiff.errors import CheckpointError
from ckptdiff.overlap import overlap

BF16 = ml_dtypes.bfloat16
GATE, UP, BOTH = (f"a.mlp.{part}.weight" for part in ("gate_proj", "up_proj", "gate_up_proj"))
Tensors = dict[str, np.ndarray]


def drawn(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def moved(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    return values * (1 + 0.1 * (rng.random(values.shape) < 0.3)).astype(np.float32)


def write(path: Path, tensors: Tensors, config: dict[str, object] | None = None) -> Path:
    path.mkdir()
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config or {}))
    return path


def fused(tensors: Tensors) -> Tensors:
    return {BOTH: np.concatenate([tensors[GATE], tensors[UP]])}


def as_bf16(tensors: Tensors) -> Tensors:
    return {name: array.astype(BF16) for name, array in tensors.items()}


def test_pieces_change_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = {GATE: drawn(rng, 40, 30), UP: drawn(rng, 40, 30)}
    tuned = [{name: moved(rng, array) for name, array in base.items()} for _ in range(2)]
    start = write(tmp_path / "base", as_bf16(base))
    runs = {}
    for place, side in enumerate(tuned):
        for form, make in {"split": dict, "fused": fused}.items():
            runs[form, place] = tmp_path / f"{form}{place}.h5"
            ckptdiff.diff(start, write(tmp_path / f"{form}{place}", as_bf16(make(side))), out=runs[form, place])
    expected = overlap([runs["split", 0], runs["split", 1]], base=start)
    found = overlap([runs["fused", 0], runs["split", 1]], base=start)
    assert found.overall(found.pairs[0]) == expected.overall(expected.pairs[0])
    assert found.overall(found.pairs[0])["o1_conditional"] is not None and not found.warnings


@pytest.mark.parametrize("compare", ["bf16", "stored"])
def test_a_quantised_base_is_read_as_its_values(compare: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    codes, scales = drawn(rng, 130, 140).astype(ml_dtypes.float8_e4m3fn), np.array([[1, 2], [4, 0.5]], np.float32)
    values = codes.astype(np.float32) * scales.repeat(128, 0).repeat(128, 1)[:130, :140]
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    quantised = write(tmp_path / "codes", {GATE: codes, f"{GATE}_scale_inv": scales}, config)
    plain = write(tmp_path / "plain", {GATE: values})
    tuned = [write(tmp_path / f"tuned{place}", as_bf16({GATE: moved(rng, values)})) for place in range(2)]
    found = []
    for base in (quantised, plain):
        runs = [tmp_path / f"{base.name}{place}.h5" for place in range(2)]
        for side, run in zip(tuned, runs, strict=True):
            ckptdiff.diff(base, side, out=run, compare=compare)
        read = overlap(runs, base=base)
        found.append(read.overall(read.pairs[0]))
    assert found[0] == found[1] and found[0]["o1_conditional"] is not None
    other = write(tmp_path / "other", {GATE: codes, f"{GATE}_scale_inv": scales * 2}, config)
    with pytest.raises(CheckpointError, match="other values"):
        overlap([tmp_path / "codes0.h5", tmp_path / "codes1.h5"], base=other)


def test_casts_of_a_quantised_base_are_told_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    codes, scale = drawn(rng, 16, 16).astype(ml_dtypes.float8_e4m3fn), np.array(0.3, np.float32)
    base = write(tmp_path / "base", {GATE: codes, f"{GATE}_scale": scale})
    tuned = write(tmp_path / "tuned", as_bf16({GATE: moved(rng, codes.astype(np.float32) * scale)}))
    for compare in ("bf16", "stored"):
        ckptdiff.diff(base, tuned, out=tmp_path / f"{compare}.h5", compare=compare)
    found = overlap([tmp_path / "bf16.h5", tmp_path / "stored.h5"])
    assert any("masks by different rules" in warning for warning in found.warnings)


@pytest.mark.parametrize("rows", [(50, 40), (40, 50)])
def test_rows_that_one_side_lacks(rows: tuple[int, int], tmp_path: Path) -> None:
    rng, name, common = np.random.default_rng(3), "model.embed_tokens.weight", min(rows)
    base = drawn(rng, rows[0], 24)
    tuned = [np.concatenate([moved(rng, base[:common]), drawn(rng, max(0, rows[1] - common), 24)]) for _ in range(2)]
    found = []
    for kind, (start, sides) in {
        "whole": (base, tuned), "common": (base[:common], [side[:common] for side in tuned])}.items():  # fmt: skip
        folder = write(tmp_path / kind, as_bf16({name: start}))
        runs = [tmp_path / f"{kind}{place}.h5" for place in range(2)]
        for side, run in zip(sides, runs, strict=True):
            ckptdiff.diff(folder, write(run.with_suffix(""), as_bf16({name: side})), out=run)
        read = overlap(runs, base=folder)
        found.append(read.overall(read.pairs[0]))
    keys = ("masked_1", "masked_2", "both", "o1", "o2", "jaccard", "o1_conditional", "o2_conditional")
    assert [found[0][key] for key in keys if key in found[0]] == [found[1][key] for key in keys if key in found[1]]
    assert found[0]["o1_conditional"] is not None


def test_a_head_that_the_base_does_not_store_has_no_chance_by_size(tmp_path: Path) -> None:
    rng, name = np.random.default_rng(4), "model.embed_tokens.weight"
    embedding = drawn(rng, 30, 16)
    base = write(tmp_path / "base", as_bf16({name: embedding}), {"tie_word_embeddings": True})
    runs = [tmp_path / f"{place}.h5" for place in range(2)]
    for run in runs:
        sides = {name: moved(rng, embedding), "lm_head.weight": moved(rng, embedding)}
        ckptdiff.diff(base, write(run.with_suffix(""), as_bf16(sides)), out=run)
    found = overlap(runs, base=base)
    tensors = {row["name"]: row for row in found.grouped(found.pairs[0], "tensor")}
    assert tensors["lm_head.weight"]["o1"] > 0 and tensors["lm_head.weight"]["o1_conditional"] is None
    assert tensors[name]["o1_conditional"] is not None
    assert found.warnings == ("no chance by size where the base stores an embedding alone: lm_head.weight",)
