"""A small model, checkpoints of it, and masks as others read them."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import torch
from safetensors.torch import save_file


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj = torch.nn.Linear(width, 3 * width, bias=False)
        self.down_proj = torch.nn.Linear(3 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down_proj(torch.relu(self.up_proj(x)))


class Model(torch.nn.Module):
    """Names like a language model's; `tied` shares the head with the embedding."""

    def __init__(self, width: int = 16, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(24, width)
        self.layers = torch.nn.ModuleList(Block(width) for _ in range(2))
        self.norm = torch.nn.LayerNorm(width)
        self.lm_head = torch.nn.Linear(width, 24, bias=False)
        self.register_buffer("position_ids", torch.arange(4))
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class Task(torch.nn.Module):
    """A model that returns its loss, as the trainer wants it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.model(input_ids)
        return {
            "loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()),
            "logits": logits,
        }


def checkpoint(folder: Path, model: torch.nn.Module, moved: float | None = None) -> Path:
    """Save a model's tensors, all of them, or some share of them moved by a little."""
    rng = np.random.default_rng(5)
    tensors = {}
    for name, tensor in model.state_dict().items():
        value = tensor.clone()
        if moved is not None and value.is_floating_point():
            value += torch.from_numpy(rng.random(value.shape) < moved) * 0.25
        tensors[name] = value
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def dense_by_h5py(run_file: Path, name: str) -> np.ndarray:
    """As docs/run-file.md says it, without ckptdiff."""
    with h5py.File(run_file) as file:
        mask = file[f"masks/{name}"]
        bits = np.unpackbits(mask[:], bitorder="little", count=mask.attrs["shape"].prod()).astype(bool)
        return bits.reshape(mask.attrs["shape"])
