"""Time the spectra on a GPU, beside the processor's and beside the eigenproblems that they cannot do without.

    PYTHONPATH=. python3 bench/gpu_spectra.py --scratch DIR [--figures FILE]    # a GPU; some 6 GB in DIR
    python bench/host_device.py KERNELS bench/gpu_spectra.py --scratch DIR --small   # without one: does it run at all?

One matrix of 11,008 x 4,096, 512 experts in one tensor, and a language model of 1.16 GB a side. The time is that of the
stage alone, reading included, the second time; figures of both devices have to be as near as the mode promises. Experts
are measured many at a time there, and their updates' leading values directly, which the processor bounds; they become
an adapter of rank 16 too, which may lose no more.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from make_pair import Entry, Weights, make_pair, write_shard
from measure import write_json

import ckptdiff
from ckptdiff.events import Event, StageBegun, StageProgress
from ckptdiff.lora import extract_lora
from ckptdiff.options import Options

NEAR = {"randomized": 1e-3, "exact": 1e-7}
"""Figures that count entries lie on both sides of a cut in float32."""
_LEADING = ("topk_energy", "topk_energy_bound", "error_bound", "stable_rank")
"""What the processor knows between bounds in randomized mode, and a device may know better."""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description="Time the spectra on a GPU.")
    parser.add_argument("--scratch", type=Path, required=True, help="where pairs are written")
    parser.add_argument("--figures", type=Path, help="keep the rows here as JSON, from the first one on")
    parser.add_argument(
        "--processor", action="store_true", help="the processor's time for large matrices too (minutes)"
    )
    parser.add_argument("--small", action="store_true", help="small sizes: does it run at all?")
    parser.add_argument("--first", type=int, metavar="N", help="only the first N of the three pairs")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns 1 if figures are wrong."""
    options = arguments(argv)
    rows: list[dict[str, Any]] = []
    for row in rows_of(options):
        rows.append(row)
        print(
            *(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
        )
        if options.figures:
            write_json(options.figures, {"rows": rows})
    return 1 if any(row.get("wrong") for row in rows) else 0


def rows_of(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each pair and mode."""
    long, short, count, size = (300, 140, 40, 1 << 20) if options.small else (11008, 4096, 512, 1_160_000_000)
    expert = (count, 64, 96) if options.small else (count, 768, 1024)
    pairs = {
        f"{long} x {short}": (one_tensor, Entry("weight", (long, short)), ("randomized", "exact")),
        f"{count} experts": (one_tensor, Entry("model.layers.0.mlp.experts.down_proj", expert), ("randomized",)),
        f"a model of {size >> 20} MiB": (make_pair, size, ("randomized",)),
    }
    for mode in ("randomized", "exact"):
        yield {"eigenproblems alone": mode, "rows": short, **decompositions(short, mode)}
    for name, (write, what, modes) in list(pairs.items())[: options.first]:
        folder = options.scratch / name.replace(" ", "-")
        write(what, folder)
        sides = folder / "base", folder / "tuned"
        for mode in modes:
            seconds, found = measured(sides, mode, "cuda")
            row = {"pair": name, "mode": mode, "spectra s, cuda": seconds}
            if options.processor or options.small or "model" in name:
                row["spectra s, cpu"], known = measured(sides, mode, "cpu")
                row["wrong"] = not near(found, known, NEAR[mode])
            yield row
        if "experts" in name:
            row = {"pair": name, "mode": "adapter"}
            row["factors s, cuda"], lost = factored(sides, folder, "cuda")
            if options.processor or options.small:
                row["factors s, cpu"], known_lost = factored(sides, folder, "cpu")
                row["wrong"] = not lost <= known_lost + NEAR["randomized"]
            yield row


def one_tensor(entry: Entry, folder: Path) -> None:
    """A pair of one tensor in bfloat16."""
    for side in ("base", "tuned"):
        (folder / side).mkdir(parents=True)
    paths = [folder / side / "model.safetensors" for side in ("base", "tuned")]
    weights = Weights(0, 0.1, "bf16")
    weights.begin_shard(0)
    with paths[0].open("wb") as base, paths[1].open("wb") as tuned:
        write_shard((base, tuned), [entry], weights)


def measured(sides: tuple[Path, Path], mode: Any, device: str) -> tuple[float, list[Any]]:
    """Seconds of the stage, the second time on a GPU, and the figures of each tensor."""
    for _ in range(2 if device == "cuda" else 1):
        lasted = Lasted("spectra")
        diff = ckptdiff.diff(*sides, mask="none", spectra=mode, device=device, gpu_memory="4G", listener=lasted)
    return lasted.seconds, [row["spectral"] for row in diff.per_tensor]


def factored(sides: tuple[Path, Path], folder: Path, device: str) -> tuple[float, float]:
    """Seconds of finding factors, the second time on a GPU, and the share of the update that they lose."""
    for turn in range(2 if device == "cuda" else 1):
        lasted, options = Lasted("factors"), Options(device=device, gpu_memory=4 << 30)
        made = extract_lora(*sides, folder / f"{device}-{turn}", rank=16, options=options, listener=lasted)
    return lasted.seconds, made.lost


class Lasted:
    """A listener that times a stage."""

    def __init__(self, stage: str) -> None:
        self._stage, self._begun, self.seconds = stage, 0.0, 0.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageBegun | StageProgress) and event.stage == self._stage:
            now = time.perf_counter()
            self._begun = self._begun or now
            self.seconds = now - self._begun


def near(found: Any, known: Any, error: float) -> bool:
    """Whether all figures are."""
    if isinstance(known, dict):
        if known.get("error_bound"):
            energies, missed = known["topk_energy"], known["topk_energy_bound"]
            above = {k: found["topk_energy"][k] - energies[k] for k in energies}
            known = {key: value for key, value in known.items() if key not in _LEADING}
            found = {key: value for key, value in found.items() if key not in _LEADING}
            if not all(-error <= above[k] <= missed[k] + error for k in above):
                return False
        return found.keys() == known.keys() and all(near(found[key], known[key], error) for key in known)
    if isinstance(known, list):
        return len(found) == len(known) and all(map(near, found, known, [error] * len(known)))
    return bool(np.isclose(found, known, error, error)) if isinstance(known, float) else found == known


def decompositions(rows: int, mode: str) -> dict[str, float]:
    """Seconds of what a mode decomposes, by torch on the GPU; nothing where torch finds none."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    noise = torch.randn(rows, rows, dtype=torch.float64 if mode == "exact" else torch.float32, device="cuda")
    gram = noise @ noise.T
    seconds = []
    for _ in range(2):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        torch.linalg.eigh(gram)
        if mode == "exact":
            torch.linalg.eigh(gram)
            torch.linalg.eigvalsh(gram)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return {"torch.linalg s": seconds[-1]}


if __name__ == "__main__":
    sys.exit(main())
