"""One step of MaskedAdamW beside torch's AdamW: time and memory, and a check that they agree.

    python bench/masked_step.py --numel 100000000 --density 0.2 --tensors 48

Each row is the median over rounds in which all optimizers take one step, each round in an order of its own: what else
the machine does meets them alike, and a step is slower after one that frees much memory.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ckptdiff.errors import plural
from ckptdiff.report.text import dumps
from ckptdiff.retrain import MaskedAdamW, PackedMask, freeze_outside

OPTIONS = {"lr": 1e-3, "weight_decay": 0.1}


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
    print(f"{given.numel:,} {given.dtype} parameters in {plural(given.tensors, 'tensor')}, density {given.density:g}")
    print(f"{'':<34}{'ms':>8}{'state, bytes per parameter':>30}")
    for row in rows:
        print(f"{row['optimizer']:<34}{row['ms']:>8.1f}{row['bytes']:>30.2f}")
    print(f"masked / fused: {rows[0]['ms'] / rows[1]['ms']:.2f}")
    if given.json:
        given.json.write_text(dumps(rows) + "\n")


def measure(numel: int, tensors: int, density: float, rounds: int, dtype: torch.dtype) -> list[dict[str, float | str]]:
    """Median time of a step of each optimizer, in milliseconds, and bytes of its state per parameter."""
    shape = (numel // tensors,)
    rng = np.random.default_rng(0)
    masks = [PackedMask.of(rng.random(shape, np.float32) < density) for _ in range(tensors)]
    makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "MaskedAdamW": lambda p: MaskedAdamW(p, dict(zip(p, masks, strict=True)), **OPTIONS),
        "torch AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True, **OPTIONS),
        "torch AdamW, foreach": lambda p: torch.optim.AdamW(p, foreach=True, **OPTIONS),
        "torch AdamW, fused, freeze_outside": lambda p: frozen(p, masks),
    }
    gradients = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(tensors)]
    optimizers = {}
    for name, make in makers.items():
        parameters = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for _ in range(tensors)]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone() if "freeze" in name else gradient
        optimizers[name] = (make(parameters), parameters)
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    shuffle = random.Random(0).sample
    for turn in range(rounds + 1):
        for name in shuffle(list(optimizers), len(optimizers)):
            optimizer = optimizers[name][0]
            start = time.perf_counter()
            optimizer.step()
            if turn:  # the first one makes the state
                times[name].append(1e3 * (time.perf_counter() - start))
    if dtype == torch.float32:
        check(optimizers["MaskedAdamW"][1], optimizers["torch AdamW, fused"][1], masks)
    return [
        {"optimizer": name, "ms": statistics.median(times[name]), "bytes": state_bytes(optimizer) / numel}
        for name, (optimizer, _) in optimizers.items()
    ]


def frozen(parameters: list[torch.nn.Parameter], masks: list[PackedMask]) -> torch.optim.Optimizer:
    """Torch's AdamW with the guarantee of a masked optimizer."""
    optimizer = torch.optim.AdamW(parameters, fused=True, **OPTIONS)
    freeze_outside(optimizer, dict(zip(parameters, masks, strict=True)))
    return optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    if isinstance(optimizer, MaskedAdamW):
        return optimizer.nbytes
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.ndim)


def check(ours: list[torch.nn.Parameter], theirs: list[torch.nn.Parameter], masks: list[PackedMask]) -> None:
    """Masked coordinates as torch's, all others as they began."""
    for masked, dense, mask in zip(ours, theirs, masks, strict=True):
        inside = torch.from_numpy(mask.dense())
        torch.testing.assert_close(masked[inside], dense[inside], rtol=1e-5, atol=1e-6)
        assert bool((masked[~inside] == 1).all())


if __name__ == "__main__":
    main()
