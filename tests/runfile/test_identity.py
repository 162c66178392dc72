"""Norms that a run knows against those of what is read again, over dtypes and updates."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import ckptdiff
from ckptdiff.checkpoint import open_checkpoint
from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.errors import CheckpointError
from ckptdiff.runfile.identity import checked_blocks, known_norms

DTYPES = {
    "f8": ml_dtypes.float8_e4m3fn,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "f32": np.float32,
    "f64": np.float64,
}
SHAPE = (300, 441)  # a little more than one block


def run_of(folder: Path, base: np.ndarray, tuned: np.ndarray, compare: str) -> ckptdiff.Diff:
    save_file({"w": base}, folder / "base.safetensors")
    save_file({"w": tuned}, folder / "tuned.safetensors")
    return ckptdiff.diff(folder / "base.safetensors", folder / "tuned.safetensors", compare=compare)


def read(path: Path, diff: ckptdiff.Diff, side: str) -> int:
    with open_shards("pread") as shards:
        return sum(
            piece.size
            for piece in checked_blocks(shards, open_checkpoint(path).tensors["w"], known_norms(diff, side)["w"])
        )


@pytest.mark.parametrize(("base", "tuned"), [*((d, d) for d in DTYPES), ("bf16", "f32"), ("f16", "bf16")])
@pytest.mark.parametrize("compare", ["bf16", "stored"])
def test_equal_values_pass_and_others_do_not(base: str, tuned: str, compare: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    weights = rng.standard_normal(SHAPE)
    moved = weights + 0.3 * rng.standard_normal(SHAPE) * (rng.random(SHAPE) < 0.1)
    sides = {"base": weights.astype(DTYPES[base]), "tuned": moved.astype(DTYPES[tuned])}
    diff = run_of(tmp_path, *sides.values(), compare)
    for side, values in sides.items():
        assert read(tmp_path / f"{side}.safetensors", diff, side) == values.nbytes
        other = values.copy()
        other[299, 400:] = (2 * other[299, 400:].astype(np.float64)).astype(values.dtype)
        save_file({"w": other}, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match=f"not the {side} checkpoint") as caught:
            read(tmp_path / "other.safetensors", diff, side)
        assert caught.value.tensor == "w" and caught.value.file == str(tmp_path / "other.safetensors")
        assert f"--{side}" in caught.value.hint


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([1e-30, 1e-4, 1.0, 1e15]),
    step=st.sampled_from([0.0, 1e-6, 1e-2, 1.0, 1e4]),
    factor=st.sampled_from([1.0, 0.0, -1.0]),
    dtypes=st.sampled_from(list(itertools.product(["bf16", "f32", "f64"], repeat=2))),
    compare=st.sampled_from(["bf16", "stored"]),
)
def test_no_pair_is_refused_as_its_own(
    seed: int, scale: float, step: float, factor: float, dtypes: tuple[str, str], compare: str
) -> None:
    """Also where the tuned side is what large sums that cancel leave."""
    rng = np.random.default_rng(seed)
    weights = scale * rng.standard_normal((3, 700))
    moved = factor * weights + scale * step * rng.standard_normal(weights.shape)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sides = {"base": weights.astype(DTYPES[dtypes[0]]), "tuned": moved.astype(DTYPES[dtypes[1]])}
        diff = run_of(folder, *sides.values(), compare)
        for side, values in sides.items():
            assert read(folder / f"{side}.safetensors", diff, side) == values.nbytes


def test_a_norm_that_no_run_can_know_is_not_asked_for(tmp_path: Path) -> None:
    weights = np.array([1.0, np.nan, 3.0], np.float32)
    diff = run_of(tmp_path, weights, weights + 1, "bf16")
    save_file({"w": weights * 5}, tmp_path / "other.safetensors")
    assert read(tmp_path / "other.safetensors", diff, "base") == weights.nbytes
