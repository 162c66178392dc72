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
    """Figures that count entries may be a few entries apart in float32, where scores fall on both sides of a cut."""
    if isinstance(known, dict):
        assert found.keys() == known.keys()
        for key in known:
            counted = error > 1e-6 and ("coverage" in key or "not_low" in key)
            assert_close(found[key], known[key], max(error, 2e-3 if counted else 0), f"{path}.{key}")
    elif isinstance(known, float):
        assert found == pytest.approx(known, rel=error, abs=error), path
    else:
        assert found == known, path
