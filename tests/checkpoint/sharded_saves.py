"""Save a model that FSDP2 and tensor parallelism cut over four ranks, in every way its trainers do."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


def save_everything(folder: Path) -> None:
    """On each rank: safetensors of the whole before it is cut, a file of the rank, and a distributed checkpoint."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    # Sizes that do not divide: slices of unequal length, and FSDP's parts of parts.
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Linear(10, 7), torch.nn.LayerNorm(7))
    if rank == 0:
        save_file({name: value.clone() for name, value in model.state_dict().items()}, folder / "whole.safetensors")
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    (folder / "ranks").mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / "ranks" / f"model_world_size_{world}_rank_{rank}.pt")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)  # so that gradients of zero move nothing
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state, of_optimizer = get_state_dict(model, optimizer)
    save({"model": state, "optimizer": of_optimizer}, checkpoint_id=folder / "nested")
    save({**state, "optimizer": of_optimizer}, checkpoint_id=folder / "flat")
