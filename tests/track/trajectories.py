"""What a trajectory holds, by NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

SHAPES = {
    "model.embed_tokens.weight": (70, 31),
    "model.layers.0.mlp.up_proj.weight": (1_100_003, 1),
    "model.layers.1.self_attn.q_proj.weight": (31, 31),
    "model.norm.weight": (37,),
    "scalar": (),
    "empty": (0, 3),
}


@dataclass(frozen=True)
class Trajectory:
    """Paths and tensors of the base and of each step."""

    paths: tuple[Path, ...]
    sides: tuple[dict[str, np.ndarray], ...]

    def rows(self, names: list[str], compare: str) -> list[dict[str, float | None]]:
        """Expected figures, one row per step."""
        values = [np.concatenate([cast(side[name], compare).ravel() for name in names]) for side in self.sides]
        base, last = values[0], values[0]
        support, union = np.zeros(base.size, bool), np.zeros(base.size, bool)
        rows = []
        finite = np.isfinite(base)
        base_norm = np.sqrt(np.square(base[finite]).sum())
        for now in values[1:]:
            differs, moved = ~same(base, now), ~same(last, now)
            with np.errstate(invalid="ignore"):
                delta = now - base
            delta = delta[np.isfinite(delta)]
            rows.append(
                {
                    "numel": base.size,
                    "support": differs.sum(),
                    "touched": (differs & ~union).sum(),
                    "returned": (differs & union & ~support).sum(),
                    "reverted": (support & ~differs).sum(),
                    "churned": (moved & differs & support).sum(),
                    "union": (union | differs).sum(),
                    "support_fraction": differs.mean() if base.size else None,
                    "union_fraction": (union | differs).mean() if base.size else None,
                    "rel_norm": np.sqrt(np.square(delta).sum()) / base_norm if base_norm else None,
                }
            )
            support, union, last = differs, union | differs, now
        return rows


def cast(tensor: np.ndarray, compare: str) -> np.ndarray:
    """Float64 values, after a cast to bfloat16 if asked for."""
    with np.errstate(over="ignore"):
        return (
            tensor.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
            if compare == "bf16"
            else tensor.astype(np.float64)
        )


def same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Equal values, NaN equal to NaN."""
    return (a == b) | (np.isnan(a) & np.isnan(b))
