"""The rounding null against drawn noise, and what the cast hides against NumPy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import ckptdiff

BF16 = ml_dtypes.bfloat16
N = 1 << 17


def compared(folder: Path, base: dict[str, np.ndarray], tuned: dict[str, np.ndarray], **options: Any) -> ckptdiff.Diff:
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    return ckptdiff.diff(folder / "base.safetensors", folder / "tuned.safetensors", mask="none", **options)


@pytest.mark.parametrize(
    ("dtype", "compare"),
    [
        (BF16, "bf16"),
        (np.float32, "bf16"),
        (np.float64, "bf16"),
        (np.float16, "stored"),
        (np.float32, "stored"),
        (ml_dtypes.float8_e4m3fn, "stored"),
    ],
)
def test_noise_is_its_own_null(tmp_path: Path, dtype: Any, compare: str) -> None:
    """Noise of any size leaves unchanged what the null of its own norm says, and moves small weights as often."""
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal(N) * 0.02).astype(dtype)
    step = 2.0**-8 if dtype in (np.float32, np.float64) and compare == "bf16" else float(ml_dtypes.finfo(dtype).eps)
    sizes = {f"{scale:g}": scale * step * 0.02 for scale in (0.003, 0.03, 0.1, 0.3, 1, 3, 30)}
    tuned = {
        name: (weights.astype(np.float64) + rng.standard_normal(N) * size).astype(dtype) for name, size in sizes.items()
    }
    diff = compared(tmp_path, dict.fromkeys(sizes, weights), tuned, compare=compare)
    unchanged = []
    for facts, row in zip(diff.tensors, diff.per_tensor, strict=True):
        null, found = row["unchanged_null"], row["unchanged_bitwise"]
        deviation = math.sqrt(max(null * (1 - null), 1 / N) / N)
        # The chance to change is told from the norm, which is as uncertain as the number of changes.
        assert found == pytest.approx(null, abs=8 * deviation + 1e-3 * (1 - null)), (facts.name, found, null)
        unchanged.append(null)
        support = (1 - found) * N
        if support > 2000 and row["low_coverage_null"]["0.1"] is not None:
            low, low_null = row["low_coverage"]["0.1"], row["low_coverage_null"]["0.1"]
            assert low == pytest.approx(low_null, abs=6 * math.sqrt(low_null / support)), facts.name
        unknown = found == 1 or (compare == "stored" and dtype == np.float32)
        assert (row["low_coverage_null"]["0.1"] is None) == unknown
    assert max(unchanged) > 0.9 and min(unchanged) < 0.1
    assert diff.overall["unchanged_null"] == pytest.approx(np.mean(unchanged), rel=1e-12)


def test_an_update_of_few_weights_is_sparser_than_its_null(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    weights = (rng.standard_normal(N) * 0.02).astype(BF16)
    tuned = np.where(rng.random(N) < 0.01, 2 * weights.astype(np.float64), weights.astype(np.float64)).astype(BF16)
    row = compared(tmp_path, {"w": weights}, {"w": tuned}).overall
    assert row["unchanged_bitwise"] > 0.98 and row["unchanged_null"] < 0.1


def test_a_base_partly_off_the_grid_counts_by_its_part(tmp_path: Path) -> None:
    """Half of the weights lie on the grid, the others anywhere: noise moves as many of each as it would alone."""
    rng = np.random.default_rng(2)
    weights = (rng.standard_normal(N) * 0.02).astype(np.float32)
    weights[::2] = weights[::2].astype(BF16)
    tuned = (weights + rng.standard_normal(N) * 1e-5).astype(np.float32)
    row = compared(tmp_path, {"w": weights}, {"w": tuned}).overall
    assert row["unchanged_null"] == pytest.approx(row["unchanged_bitwise"], abs=5e-3)
    assert row["low_coverage_null"]["0.1"] == pytest.approx(row["low_coverage"]["0.1"], rel=0.05)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("base", "tuned", "null"),
    [
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([0, 0, 0], [0, 0, 0], 1.0),
        ([NAN, NAN], [NAN, NAN], 1.0),
        ([NAN, INF], [1, 2], 1.0),
        ([0, 0, 0], [1, 1, 1], 0.0),
        ([1, 1, INF, NAN], [1e30, 1, INF, NAN], 0.5),
        ([], [], None),
        ([1e30, -1e30], [-1e38, 1e38], 0.0),
        ([1e-40, 1e-40], [2e-40, 1e-40], None),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, np.float32, np.float64])
@pytest.mark.parametrize("compare", ["bf16", "stored"])
def test_corners(tmp_path: Path, base: list, tuned: list, null: float | None, dtype: Any, compare: str) -> None:
    sides = [{"w": np.array(side, np.float64).astype(dtype)} for side in (base, tuned)]
    found = compared(tmp_path, *sides, compare=compare).per_tensor[0]["unchanged_null"]
    if null is not None:
        assert found == pytest.approx(null, abs=1e-3)
    else:
        assert found is None if not base else 0 <= found <= 1


@pytest.mark.parametrize("base", [np.float32, np.float64, np.float16, BF16, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("tuned", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_absorbed_energy_is_what_the_cast_hides(tmp_path: Path, base: Any, tuned: Any, device: str) -> None:
    rng = np.random.default_rng(3)
    left = (rng.standard_normal(70_001) * 0.02).astype(base)
    right = (left.astype(np.float64) * (1 + 3e-3 * rng.standard_normal(left.size))).astype(tuned)
    left[5], right[6], left[7], right[8] = -0.0, 3e-5, 1e-7, NAN
    if tuned != np.float16:
        right[9] = INF
    one, other = left.astype(np.float64), right.astype(np.float64)
    square = np.where(np.isfinite(other - one), other - one, 0) ** 2
    cast = [side.astype(np.float32).astype(BF16) for side in (left, right)]
    equal = cast[0] == cast[1]
    diff = compared(
        tmp_path, {"w": left, "exact": np.ones(64, BF16)}, {"w": right, "exact": np.ones(64, BF16)}, device=device
    )
    rows = dict(zip((facts.name for facts in diff.tensors), diff.per_tensor, strict=True))
    assert rows["w"]["absorbed_energy"] == pytest.approx(square[equal].sum() / square.sum(), rel=1e-12)
    assert 0 < rows["w"]["absorbed_energy"] < 1 and rows["exact"]["absorbed_energy"] is None
    assert diff.overall["absorbed_energy"] == pytest.approx(rows["w"]["absorbed_energy"], rel=1e-12)
