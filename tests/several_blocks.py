"""A pair with tensors of several blocks, in float32 and in bfloat16, small ones between them and an empty one."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file


def save_several_blocks(folder: Path, narrow: int) -> tuple[str, str]:
    """Save both sides; that in bfloat16 has `narrow` rows of somewhat more than a block."""
    rng = np.random.default_rng(5)
    base = {
        "a.wide.weight": rng.normal(0, 0.02, (3, 1 << 20)).astype(np.float32),
        "b.norm.weight": rng.normal(1, 0.02, 64).astype(np.float32),
        "c.narrow.weight": rng.normal(0, 0.02, (narrow, (1 << 20) + 9)).astype(ml_dtypes.bfloat16),
        "d.ids": np.arange(50),
        "e.none": np.zeros((0, 3), np.float32),
    }
    tuned = {name: values + (rng.random(values.shape) < 0.1).astype(values.dtype) for name, values in base.items()}
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    for path, tensors in zip(paths, (base, tuned), strict=True):
        save_file(tensors, path)
    return str(paths[0]), str(paths[1])
