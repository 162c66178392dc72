"""Checkpoints of the study as real ones are: shards with an index, in float32 or bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from model import Model
from safetensors.torch import load_file, save_file
from settings import Scale

SHARDS = 2


def save(model: Model, folder: Path, dtype: torch.dtype) -> Path:
    """Write a model's tensors to shards of about equal size."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    total, done = sum(tensor.numel() for tensor in tensors.values()), 0
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(SHARDS)]
    for name, tensor in tensors.items():
        shards[min(done * SHARDS // total, SHARDS - 1)][name] = tensor
        done += tensor.numel()
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total * dtype.itemsize}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def load(folder: Path, scale: Scale, width: int) -> Model:
    """A model with the tensors of a checkpoint, in float32."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    model = Model(width, scale.layers, scale.digits, seed=0)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model
