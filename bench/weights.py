"""Time pairs whose sides are not stored alike beside pairs that are: fused experts, swapped axes, codes with scales.

    python bench/weights.py [--size 1GiB] [--rounds 5] [--threads N] [--json FILE]

Each round compares all pairs in turns, each in a process of its own, which says how long ``ckptdiff.diff`` took and
what it held at most. The figures of a pair are checked against those of the same weights in one layout. Prints ratios
of medians; needs torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ckptdiff import parse_size

INNER, HIDDEN = 768, 2048
"""Of an expert: its gate and up are [INNER, HIDDEN] each."""
MOVED = 0.1
LAYER = "model.layers.0.mlp"

CHILD = """
import json, sys, time
import ckptdiff
base, tuned, threads = sys.argv[1:]
begun = time.perf_counter()
found = ckptdiff.diff(base, tuned, threads=int(threads))
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({
    "seconds": time.perf_counter() - begun,
    "peak": int(peak) << 10,
    "unchanged": found.overall["unchanged_bitwise"],
    "rel_norm": found.overall["rel_norm"],
    "values": found.coverage["base"].compared,
}))
"""


def experts(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [count, 2 INNER, HIDDEN] in bfloat16, and the same with a tenth of the codes moved by a step."""
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(count, 2 * INNER, HIDDEN, generator=generator) * 0.02).to(torch.bfloat16)
    codes = base.view(torch.int16) ^ (torch.rand(base.shape, generator=generator) < MOVED).to(torch.int16)
    return base, codes.view(torch.bfloat16)


def split(fused: torch.Tensor) -> dict[str, torch.Tensor]:
    """Experts one by one."""
    halves = {"gate_proj": fused[:, :INNER], "up_proj": fused[:, INNER:]}
    return {
        f"{LAYER}.experts.{e}.{name}.weight": part[e].contiguous()
        for e in range(len(fused))
        for name, part in halves.items()
    }


def fp8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, the inverse scale of each block of 128 by 128, and what they stand for."""
    rows, columns = values.shape
    blocks = values.float().reshape(rows // 128, 128, columns // 128, 128)
    scales = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
    decoded = codes.float().reshape(blocks.shape) * scales[:, None, :, None]
    return codes, scales, decoded.reshape(rows, columns)


def nvfp4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes two to a byte, scales of sixteen values in e4m3, the scale of all, and what they stand for."""
    groups = values.float().reshape(len(values), -1, 16)
    whole = groups.abs().amax() / (6 * 448)
    scales = (groups.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    scaled = groups / (scales.float()[..., None] * whole).clamp_min(1e-30)
    steps = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    codes = torch.bucketize(scaled.abs(), steps).to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3
    sizes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    signed = torch.where(codes > 7, -sizes[(codes & 7).int()], sizes[(codes & 7).int()])
    decoded = (signed * scales.float()[..., None] * whole).reshape(values.shape)
    codes = codes.reshape(len(values), -1)
    return codes[:, ::2] | codes[:, 1::2] << 4, scales, whole.reshape(()), decoded


def write(folder: Path, tensors: dict[str, torch.Tensor], **quantization: Any) -> Path:
    """A checkpoint with its configuration."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization} if quantization else {}))
    return folder


BESIDE = {
    "experts: one by one, fused": "experts: one by one",
    "experts: one by one, swapped and in turns": "experts: one by one",
    "bf16: what fp8 holds": "bf16: a tenth moved",
    "bf16: fp8 in blocks": "bf16: what fp8 holds",
    "bf16: what NVFP4 holds": "bf16: a tenth moved",
    "bf16: NVFP4": "bf16: what NVFP4 holds",
}
"""The pair that each is timed beside. Quantising moves nearly all values, which takes longer than a tenth."""


def make_pairs(scratch: Path, size: int) -> dict[str, tuple[Path, Path]]:
    """Pairs by name."""
    base, tuned = experts(max(1, size // (4 * INNER * HIDDEN)))
    one = write(scratch / "split", split(base))
    pairs = {"experts: one by one": (one, write(scratch / "split-tuned", split(tuned)))}
    pairs["experts: one by one, fused"] = one, write(scratch / "fused", {f"{LAYER}.experts.gate_up_proj": tuned})
    swapped = torch.stack([tuned[:, :INNER], tuned[:, INNER:]], 2).reshape(tuned.shape).transpose(1, 2).contiguous()
    bias = torch.zeros(len(base), 2 * INNER, dtype=torch.bfloat16)
    pairs["experts: one by one, swapped and in turns"] = (
        one,
        write(
            scratch / "swapped",
            {f"{LAYER}.experts.gate_up_proj": swapped, f"{LAYER}.experts.gate_up_proj_bias": bias},
        ),
    )
    name = "model.layers.0.mlp.up_proj"
    dense = base.reshape(-1, HIDDEN)
    plain = write(scratch / "dense", {f"{name}.weight": dense})
    pairs["bf16: a tenth moved"] = plain, write(scratch / "dense-tuned", {f"{name}.weight": tuned.reshape(-1, HIDDEN)})
    codes, scales, decoded = fp8(dense)
    held = write(scratch / "fp8-values", {f"{name}.weight": decoded.to(torch.bfloat16)})
    pairs["bf16: what fp8 holds"] = plain, held
    quantised = write(
        scratch / "fp8",
        {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales},
        quant_method="fp8",
        weight_block_size=[128, 128],
    )
    pairs["bf16: fp8 in blocks"] = plain, quantised
    packed, grid, whole, decoded = nvfp4(dense)
    held = write(scratch / "nvfp4-values", {f"{name}.weight": decoded.to(torch.bfloat16)})
    pairs["bf16: what NVFP4 holds"] = plain, held
    pairs["bf16: NVFP4"] = (
        plain,
        write(
            scratch / "nvfp4",
            {f"{name}.weight": packed, f"{name}.weight_scale": grid, f"{name}.weight_scale_2": whole},
        ),
    )
    return pairs


def measure(pair: tuple[Path, Path], threads: int) -> dict[str, Any]:
    """One comparison in a process of its own."""
    command = [sys.executable, "-c", CHILD, *map(str, pair), str(threads)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def check(found: dict[str, dict[str, Any]]) -> None:
    """Pieces give the figures of whole tensors, codes those of what they stand for: the error of their format."""
    for name, other in found.items():
        one = found[BESIDE.get(name, name)]
        if not name.startswith("bf16: what"):
            assert other["unchanged"] == one["unchanged"], (name, other, one)
            assert np.isclose(other["rel_norm"], one["rel_norm"], rtol=1e-12), (name, other, one)
        assert other["values"] >= one["values"], (name, other)
    assert 0.02 < found["bf16: fp8 in blocks"]["rel_norm"] < 0.03, found
    assert 0.05 < found["bf16: NVFP4"]["rel_norm"] < 0.15, found


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Time pairs whose sides are not stored alike.")
    parser.add_argument("--size", type=parse_size, default=1 << 30, help="bytes of bfloat16 a side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--scratch", type=Path, help="where the pairs are made")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rounds: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        pairs = make_pairs(Path(scratch), given.size)
        for _ in range(given.rounds + 1):  # the first compiles, and fills the page cache
            rounds.append({name: measure(pair, given.threads) for name, pair in pairs.items()})
            check(rounds[-1])
    figures = {}
    for name in pairs:
        first = BESIDE.get(name, name)
        seconds = statistics.median(each[name]["seconds"] for each in rounds[1:])
        ratio = statistics.median(each[name]["seconds"] / each[first]["seconds"] for each in rounds[1:])
        peak = max(each[name]["peak"] for each in rounds[1:]) >> 20
        figures[name] = {"seconds": seconds, "ratio": ratio, "peak_mib": peak}
        print(f"{name:45} {seconds:7.3f} s  {ratio:5.2f}  {peak:4} MiB")
    if given.json:
        about = {"size": given.size, "rounds": given.rounds, "threads": given.threads, "machine": platform.processor()}
        given.json.write_text(json.dumps({**about, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
