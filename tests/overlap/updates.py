"""Run files of updates, with all tensors at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

import ckptdiff

SHAPES = {
    "model.embed_tokens.weight": (70, 31),
    "model.layers.0.self_attn.q_proj.weight": (31, 31),
    "model.layers.0.mlp.up_proj.weight": (90, 31),
    "model.layers.1.mlp.up_proj.weight": (1_200_007, 1),
    "model.norm.weight": (31,),
    "empty": (0, 3),
}


@dataclass(frozen=True)
class Updates:
    """Paths and arrays: `tuned[i]` is update i of `base`."""

    folder: Path
    base: dict[str, np.ndarray]
    tuned: list[dict[str, np.ndarray]]

    def run(self, index: int, mask: str = "bitwise", **options: object) -> Path:
        path = self.folder / f"{index}-{mask.replace(':', '-')}.h5"
        if not path.exists():
            ckptdiff.diff(
                self.folder / "base.safetensors",
                self.folder / f"tuned{index}.safetensors",
                out=path,
                mask=mask,
                **options,
            )
        return path

    def masks(self, index: int, eps: float = 0.0) -> dict[str, np.ndarray]:
        """By NumPy, not by ckptdiff."""
        result = {}
        for name, before in self.base.items():
            after = self.tuned[index][name]
            moved = before.astype(np.float32) != after.astype(np.float32)
            result[name] = moved if eps == 0 else np.abs(after.astype(np.float32) - before.astype(np.float32)) > eps
        return result
