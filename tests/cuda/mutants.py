"""Break the kernels in one place at a time; the tests must notice each (``make mutants``).

Each mutant is one replacement in a copy of the source. The tests named with it run against the copy and must fail; one
that passes, or a text that is not found exactly once, ends the script with an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BF16 = "test_scan_equals_reference and bf16-bf16-bf16 or refine and bf16-bf16-bf16"


@dataclass(frozen=True)
class Mutant:
    """One replacement, and the tests (``pytest -k``) that must fail with it."""

    name: str
    file: str
    old: str
    new: str
    tests: str = BF16


KERNELS = [
    Mutant("window not cleared", "cuda/scan.cu", "    hot.clear();\n", ""),
    Mutant("no barrier after clearing", "cuda/scan.cu", "    hot.clear();\n    __syncthreads();\n", "    hot.clear();\n"),
    Mutant("no barrier before handing over", "cuda/scan.cu", "    __syncthreads(); // the block is done counting\n", ""),
    Mutant(
        "no barrier after handing over",
        "cuda/scan.cu",
        "    __syncthreads(); // before anyone counts again\n",
        "",
        "many_tensors",
    ),
    Mutant("no barrier between warp sums", "cuda/reduce.cuh", "    }\n    __syncthreads();\n    if", "    }\n    if"),
    Mutant(
        "no barrier after block sums",
        "cuda/reduce.cuh",
        "    __syncthreads(); // before the next call writes\n",
        "",
        "grid_or_schedule",
    ),
    Mutant("no barrier while ordering ties", "cuda/ties.cu", "= upto;\n    __syncthreads();\n", "= upto;\n", "top_takes"),
    Mutant(
        "no barrier after ordering ties",
        "cuda/ties.cu",
        "    __syncthreads(); // before the next call writes\n",
        "",
        "top_takes",
    ),
    Mutant(
        "barrier that some never reach",
        "cuda/reduce.cuh",
        "    if (threadIdx.x < COLUMNS) {\n",
        "    if (threadIdx.x < COLUMNS) {\n        __syncthreads();\n",
    ),
    Mutant("exchange in half a warp", "cuda/reduce.cuh", "step = WARP / 2; step; step /= 2) x +=", "step = threadIdx.x % 2 ? 16 : 8; step; step /= 2) x +="),
    Mutant("last coordinates left out", "cuda/scan.cu", "start < tile.numel; start += THREADS * 8", "start + 8 < tile.numel; start += THREADS * 8"),
    Mutant("one coordinate too many", "cuda/scan.cu", "part + k >= tile.numel", "part + k > tile.numel"),
    Mutant("last tile of a block left out", "cuda/scan.cu", "(blockIdx.x + 1) / gridDim.x);\n    Own", "(blockIdx.x + 1) / gridDim.x) - (blockIdx.x == 1);\n    Own"),
    Mutant("cut excluded from what it bounds", "cuda/scan.cu", "c.size > (Bits)settings.cut;", "c.size >= (Bits)settings.cut;", "threshold_belongs"),
    Mutant("threshold excluded", "cuda/scan.cu", "c.size > (Bits)settings.thresholds[i]", "c.size >= (Bits)settings.thresholds[i]", "threshold_belongs"),
    Mutant("eta excluded", "cuda/pair.cuh", "fabs((double)d) <= __dmul_rn", "fabs((double)d) < __dmul_rn", "eta_belongs"),
    Mutant("minus zero is a change", "cuda/pair.cuh", "a != b && (magnitude<COMPARE>(a) | magnitude<COMPARE>(b)) != 0", "a != b"),
    Mutant("infinite d counts as finite", "cuda/pair.cuh", "finite = size < magnitude_bits", "finite = size <= magnitude_bits", "infinity"),
    Mutant("NaN among the weights", "cuda/pair.cuh", "code > COMPARE::INFINITE ? BINS", "code > COMPARE::INFINITE + 1 ? BINS", "scan_equals and f32-f32-f32"),
    Mutant("rounds half up", "cuda/formats.cuh", "bits + 0x7fff + (bits >> 16 & 1)", "bits + 0x8000", "scan_equals and f32-f32-bf16"),
    Mutant("distance across zero", "cuda/pair.cuh", "return x + y;", "return x > y ? x - y : y - x;"),
    Mutant("one bin beyond the window", "cuda/hot.cuh", "place < WINDOW", "place <= WINDOW", "scan_equals"),
    Mutant("ties not in order", "cuda/ties.cu", "u64 own = ordinal + sum_before(__popc(ties), warps, in_row)", "u64 own = ordinal + 0 * sum_before(__popc(ties), warps, in_row)", "top_takes"),
    Mutant("tie taken twice", "cuda/ties.cu", "(own + 1) * settings.take / settings.ties >", "(own + 1) * settings.take / settings.ties >=", "top_takes"),
    Mutant("ties of earlier spans forgotten", "cuda/ties.cu", "u64 ordinal = *next;", "u64 ordinal = 0;", "top_takes"),
    Mutant("changed weights of a cut mixed up", "cuda/refine.cu", "2, weight_rows + LOW_BINS", "2, weight_rows", "refine and f32-f32-f32"),
    Mutant("an empty bin is brought home", "cuda/harvest.cu", "if (!bins[i]) continue;", "", "harvest"),
    Mutant("last bins not brought home", "cuda/harvest.cu", "i < size;", "i < size - 1;", "harvest"),
]  # fmt: skip


def survives(mutant: Mutant) -> str | None:
    """Why a mutant is not noticed; None if it is."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as scratch:
        for folder in ("ckptdiff", "cuda", "tests", "fixtures"):
            shutil.copytree(ROOT / folder, Path(scratch, folder), ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", scratch)
        path = Path(scratch, mutant.file)
        source = path.read_text()
        if source.count(mutant.old) != 1:
            return f"its text is found {source.count(mutant.old)} times"
        path.write_text(source.replace(mutant.old, mutant.new))
        tests = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "tests/cuda", "-k", mutant.tests]
        environment = {**os.environ, "PYTHONPATH": scratch, "CKPTDIFF_TEST_BUILD_ALL": "0"}
        found = subprocess.run(tests, cwd=scratch, env=environment, capture_output=True, text=True)
        # 1: tests failed; a barrier that hangs, or a wild address, ends the process by a signal.
        return None if found.returncode == 1 or found.returncode < 0 else f"tests ended with {found.returncode}"


def main(names: list[str]) -> int:
    """Try all mutants, or those whose name contains one of the arguments."""
    chosen = [mutant for mutant in KERNELS if not names or any(name in mutant.name for name in names)]
    alive = 0
    with ThreadPoolExecutor(2) as pool:
        for mutant, why in zip(chosen, pool.map(survives, chosen), strict=True):
            print(f"{mutant.name:40} {'noticed' if why is None else 'SURVIVES: ' + why}", flush=True)
            alive += why is not None
    print(f"{len(chosen) - alive} of {len(chosen)} noticed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
