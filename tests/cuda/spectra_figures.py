"""Spectral figures of a run, and whether they are those of another device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file


def write_pair(folder: Path, shapes: dict[str, tuple[int, ...]], singles: tuple[str, ...] = ()) -> tuple[str, str]:
    """Weights in bfloat16, or float32 if they are among `singles`, and an update of noise, rounded."""
    rng, sides = np.random.default_rng(0), ({}, {})  # type: ignore[var-annotated]
    for name, shape in shapes.items():
        dtype = np.float32 if name in singles else ml_dtypes.bfloat16
        base = (0.02 * rng.standard_normal(shape)).astype(dtype)
        tuned = (base.astype(np.float32) + 2e-4 * rng.standard_normal(shape)).astype(dtype)
        sides[0][name], sides[1][name] = base, tuned
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    for path, tensors in zip(paths, sides, strict=True):
        save_file(tensors, path)
    return str(paths[0]), str(paths[1])


def spectral(diff: Any) -> dict[str, Any]:
    """By tensor."""
    return {facts.name: row["spectral"] for facts, row in zip(diff.tensors, diff.per_tensor, strict=True)}


def assert_close(found: Any, known: Any, error: float, path: str = "") -> None:
    """Figures that count entries may be a few entries apart in float32, where scores fall on both sides of a cut.

    A device finds the leading values of more updates directly: they may exceed the processor's by what that says it
    may have missed, and miss no more.
    """
    if isinstance(known, dict):
        assert found.keys() == known.keys()
        missed = known.get("topk_energy_bound", {}) if known.get("error_bound") else {}
        for key in known:
            if missed and key in ("topk_energy", "topk_energy_bound", "error_bound", "stable_rank"):
                continue
            counted = error > 1e-6 and ("coverage" in key or "not_low" in key)
            assert_close(found[key], known[key], max(error, 2e-3 if counted else 0), f"{path}.{key}")
        for k, bound in missed.items():
            assert -error <= found["topk_energy"][k] - known["topk_energy"][k] <= bound + error, f"{path} {k}"
            assert found["topk_energy_bound"][k] <= bound + error, f"{path} {k}"
        if missed:
            largest = 1 + missed["1"] / known["topk_energy"]["1"]
            assert 1 - error <= known["stable_rank"] / found["stable_rank"] <= largest + error, path
    elif isinstance(known, float):
        assert found == pytest.approx(known, rel=error, abs=error), path
    else:
        assert found == known, path
