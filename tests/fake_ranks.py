"""Saves of several ranks, made in one process: torch's fake process group lets it be one rank after the other."""

import math
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def as_rank(rank, shape):
    """Be one of the ranks of a mesh."""
    world, hook = math.prod(shape), sys.excepthook
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield init_device_mesh("cpu", shape)
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook  # torch's own names the rank, and stays


def part_of(whole, mesh, placements):
    """What the rank that this process is holds of a tensor, cut by torch.chunk."""
    local = whole
    for at, placement in enumerate(placements):
        if isinstance(placement, Shard):
            parts = torch.chunk(local, mesh.size(at), placement.dim)
            rank = mesh.get_local_rank(at)
            local = parts[rank] if rank < len(parts) else local.narrow(placement.dim, 0, 0)
    return DTensor.from_local(
        local.clone(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def ranks_of(shape, make):
    """The state that `make(mesh)` gives on each rank."""
    for rank in range(math.prod(shape)):
        with as_rank(rank, shape) as mesh:
            yield rank, make(mesh)


def save_by_ranks(folder, shape, make, name="model"):
    """A file of torch.save for each rank."""
    folder.mkdir(exist_ok=True)
    world = math.prod(shape)
    for rank, state in ranks_of(shape, make):
        torch.save(state, folder / f"{name}_world_size_{world}_rank_{rank}.pt")
    return folder


def save_as_dcp(folder, shape, make):
    """What torch.distributed.checkpoint.save leaves, by its planner and its writer, one rank after the other."""
    writers, plans, states = [], [], []
    for rank, state in ranks_of(shape, make):
        planner, writer = DefaultSavePlanner(), FileSystemWriter(folder)
        planner.set_up_planner(state, is_coordinator=rank == 0)
        writer.set_up_storage_writer(is_coordinator=rank == 0)
        plans.append(writer.prepare_local_plan(planner.create_local_plan()))
        writers.append((planner, writer))
        states.append(state)
    plans, metadata = writers[0][0].create_global_plan(plans)
    plans = writers[0][1].prepare_global_plan(plans)
    results = []
    for (planner, writer), plan in zip(writers, plans, strict=True):
        done = writer.write_data(planner.finish_plan(plan), planner)
        results.append(done.wait())
    writers[0][1].finish(metadata, results)
    return folder
