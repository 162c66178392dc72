"""One step of MaskedAdamW, and of torch's AdamW under freeze_outside, beside torch's AdamW: time, memory, and a check.

    python bench/masked_step.py --numel 100000000 --density 0.2 --tensors 400
    OMP_NUM_THREADS=1 python bench/masked_step.py --tensors 1

Each row is the median over rounds in which all optimizers take one step, each round in an order of its own: what else
the machine does meets them alike, and a step is slower after one that frees much memory. Ratios are medians of those
within rounds. On a busy machine the time on the processor, with one thread, says more than the time that passed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine, table

from ckptdiff.errors import plural
from ckptdiff.report.text import dumps
from ckptdiff.retrain import MaskedAdamW, PackedMask, freeze_outside

OPTIONS = {"lr": 1e-3, "weight_decay": 0.1}
MASKED, FUSED, FOREACH = "MaskedAdamW", "torch AdamW, fused", "torch AdamW, foreach"
FROZEN = f"{FUSED}, freeze_outside"


@dataclass(frozen=True, slots=True)
class Turn:
    """Seconds of a step: that passed, and of all threads on the processor."""

    wall: float
    cpu: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--numel", type=int, default=100_000_000)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--tensors", type=int, default=48, help="how many parameters share the coordinates evenly")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = measure(given.numel, given.tensors, given.density, given.rounds, getattr(torch, given.dtype))
    print(f"{machine()['processor']}, {plural(torch.get_num_threads(), 'thread')} of torch's")
    print(f"{given.numel:,} {given.dtype} parameters in {plural(given.tensors, 'tensor')}, density {given.density:g}")
    print(table("", rows))
    if given.json:
        given.json.write_text(dumps(rows) + "\n")


def measure(numel: int, tensors: int, density: float, rounds: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Of each optimizer, the median time of a step in milliseconds, its ratio to fused, and bytes of state."""
    shape = (numel // tensors,)
    rng = np.random.default_rng(0)
    masks = [PackedMask.of(rng.random(shape, np.float32) < density) for _ in range(tensors)]
    makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        MASKED: lambda p: MaskedAdamW(p, dict(zip(p, masks, strict=True)), **OPTIONS),
        FUSED: lambda p: torch.optim.AdamW(p, fused=True, **OPTIONS),
        FOREACH: lambda p: torch.optim.AdamW(p, foreach=True, **OPTIONS),
        FROZEN: lambda p: frozen(p, masks),
    }
    gradients = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(tensors)]
    optimizers = {}
    for name, make in makers.items():
        parameters = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for _ in range(tensors)]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone() if name == FROZEN else gradient
        optimizers[name] = (make(parameters), parameters)
    turns: dict[str, list[Turn]] = {name: [] for name in optimizers}
    shuffle = random.Random(0).sample
    for turn in range(rounds + 1):
        for name in shuffle(list(optimizers), len(optimizers)):
            optimizer = optimizers[name][0]
            wall, cpu = time.perf_counter(), time.process_time()
            optimizer.step()
            if turn:  # the first one makes the state
                turns[name].append(Turn(time.perf_counter() - wall, time.process_time() - cpu))
    check({name: parameters for name, (_, parameters) in optimizers.items()}, masks)
    return [
        {
            "optimizer": name,
            "ms": 1e3 * statistics.median(turn.wall for turn in turns[name]),
            "ms of processor": 1e3 * statistics.median(turn.cpu for turn in turns[name]),
            "/ fused": ratio(turns[name], turns[FUSED], "wall"),
            "/ fused, of processor": ratio(turns[name], turns[FUSED], "cpu"),
            "state, bytes per parameter": state_bytes(optimizer) / numel,
        }
        for name, (optimizer, _) in optimizers.items()
    ]


def ratio(ours: list[Turn], theirs: list[Turn], clock: str) -> float:
    """Median over rounds."""
    return statistics.median(getattr(a, clock) / getattr(b, clock) for a, b in zip(ours, theirs, strict=True))


def frozen(parameters: list[torch.nn.Parameter], masks: list[PackedMask]) -> torch.optim.Optimizer:
    """Torch's AdamW with the guarantee of a masked optimizer."""
    optimizer = torch.optim.AdamW(parameters, fused=True, **OPTIONS)
    freeze_outside(optimizer, dict(zip(parameters, masks, strict=True)))
    return optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    if isinstance(optimizer, MaskedAdamW):
        return optimizer.nbytes
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.ndim)


def check(parameters: dict[str, list[torch.nn.Parameter]], masks: list[PackedMask]) -> None:
    """Masked coordinates as torch's, all others as they began."""
    for masked, frozen, dense, mask in zip(
        parameters[MASKED], parameters[FROZEN], parameters[FUSED], masks, strict=True
    ):
        inside = torch.from_numpy(mask.dense())
        assert torch.equal(frozen[inside], dense[inside])
        assert bool((masked[~inside] == 1).all()) and bool((frozen[~inside] == 1).all())
        if masked.dtype == torch.float32:  # of bfloat16 ours has masters
            torch.testing.assert_close(masked[inside], dense[inside], rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    main()
