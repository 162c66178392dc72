"""What people do today: a straightforward torch diff, and GNU cmp.

    python bench/peers.py torch BASE TUNED
    python bench/peers.py torch-float64 BASE TUNED
    python bench/peers.py cmp BASE TUNED

Each prints its findings and its own time as JSON. torch is imported by the first two alone. They differ in the
norms: in float32, as most would write it, they are fast and off by up to 0.3 % (seen); in float64 they can be
checked against.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import time
from pathlib import Path
from typing import Any

EPS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)


def torch_diff(base: Path, tuned: Path, float64: bool) -> dict[str, Any]:
    """Per tensor: open safely, round to bf16, upcast, subtract, count within thresholds, take norms."""
    import torch
    from safetensors import safe_open

    norm_dtype = torch.float64 if float64 else torch.float32
    files = {}
    for side in (base, tuned):
        found: dict[str, Any] = {}
        for path in sorted(side.glob("*.safetensors")):
            opened = safe_open(path, framework="pt")
            found |= dict.fromkeys(opened.keys(), opened)
        files[side] = found
    numel = equal = 0
    within = dict.fromkeys(EPS, 0)
    delta_square = base_square = 0.0
    for name, opened in files[base].items():
        w0 = opened.get_tensor(name).bfloat16()
        w1 = files[tuned][name].get_tensor(name).bfloat16()
        numel += w0.numel()
        equal += int(torch.count_nonzero(w0 == w1))
        w0 = w0.float()
        delta = w1.float() - w0
        size = delta.abs()
        for eps in EPS:
            within[eps] += int(torch.count_nonzero(size <= eps))
        delta_square += float(torch.linalg.vector_norm(delta, dtype=norm_dtype)) ** 2
        base_square += float(torch.linalg.vector_norm(w0, dtype=norm_dtype)) ** 2
    return {
        "numel": numel,
        "equal": equal,
        "within": {f"{eps:g}": count for eps, count in within.items()},
        "delta_norm": math.sqrt(delta_square),
        "base_norm": math.sqrt(base_square),
    }


def cmp_diff(base: Path, tuned: Path) -> dict[str, Any]:
    """Count the bytes that differ, shard by shard; `cmp` alone would stop at the first."""
    differing = 0
    for path in sorted(base.glob("*.safetensors")):
        # cmp compares no further than the first difference when its output is /dev/null, so let wc take it.
        listing = subprocess.Popen(["cmp", "-l", path, tuned / path.name], stdout=subprocess.PIPE)
        counted = subprocess.run(["wc", "-l"], stdin=listing.stdout, capture_output=True, check=True)
        if listing.wait() > 1:
            raise SystemExit(f"cmp failed on {path}")
        differing += int(counted.stdout)
    return {"differing_bytes": differing}


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Time a peer on a checkpoint pair.")
    parser.add_argument("peer", choices=("torch", "torch-float64", "cmp"))
    parser.add_argument("base", type=Path)
    parser.add_argument("tuned", type=Path)
    options = parser.parse_args()
    begun = time.perf_counter()
    if options.peer == "cmp":
        found = cmp_diff(options.base, options.tuned)
    else:
        found = torch_diff(options.base, options.tuned, options.peer == "torch-float64")
    print(json.dumps(found | {"seconds": time.perf_counter() - begun}))


if __name__ == "__main__":
    main()
