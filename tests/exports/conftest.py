"""Two checkpoints of one small model, bf16 and float32 tensors and some that are not weights, and runs of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckptdiff

Tensors = dict[str, torch.Tensor]


def base_tensors() -> Tensors:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "model.embed_tokens.weight": (50, 24),
        "model.layers.0.self_attn.q_proj.weight": (24, 24),
        "model.layers.0.mlp.up_proj.weight": (40, 24),
        "model.layers.0.mlp.down_proj.weight": (24, 40),
        "model.norm.weight": (24,),
    }
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].float()
    return {**tensors, "position_ids": torch.arange(9), "scalar": torch.tensor(3.0)}


def tuned_tensors() -> Tensors:
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, value in base_tensors().items():
        moves = torch.rand(value.shape, generator=generator) < 0.4
        delta = torch.randn(value.shape, generator=generator) * 0.1
        tensors[name] = torch.where(moves, value + delta.to(value.dtype), value)
    tensors["position_ids"][3] = 77
    return tensors


@pytest.fixture(scope="session")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("exports")
    save_file(base_tensors(), folder / "base.safetensors")
    save_file(tuned_tensors(), folder / "tuned.safetensors")
    return folder / "base.safetensors", folder / "tuned.safetensors"


@pytest.fixture(scope="session")
def make_run(sides: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(**options: object) -> Path:
        path = tmp_path_factory.mktemp("runs") / "run.h5"
        ckptdiff.diff(*sides, out=path, **options)
        return path

    return make
