"""How fast this machine reads a pair: both sides mapped and xor-reduced, 64 bits at a time.

    python bench/read_limit.py BASE TUNED [--threads N] [--rounds N]

The least work that touches every byte once; no diff can be faster. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import numpy.typing as npt

WORDS_A_JOB = 1 << 21


@numba.njit(numba.uint64(numba.types.Array(numba.uint64, 1, "C", readonly=True)), nogil=True)
def xor_reduce(words: npt.NDArray[np.uint64]) -> np.uint64:
    """Xor of all words; LLVM turns the loop into vector loads."""
    result = np.uint64(0)
    for i in range(words.size):
        result ^= words[i]
    return result


def shards(*sides: Path) -> list[Path]:
    """Every safetensors file of the checkpoints."""
    return [path for side in sides for path in sorted(side.glob("*.safetensors"))]


def read_limit(sides: Sequence[Path], threads: int) -> float:
    """Seconds to map and read every shard of the sides once."""
    begun = time.perf_counter()
    jobs = []
    maps = []
    for path in shards(*sides):
        with path.open("rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        words = np.frombuffer(maps[-1], np.uint64, len(maps[-1]) // 8)
        jobs += [words[at : at + WORDS_A_JOB] for at in range(0, words.size, WORDS_A_JOB)]
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(xor_reduce, jobs):
            pass
    return time.perf_counter() - begun


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Time the machine's read limit on a checkpoint pair.")
    parser.add_argument("base", type=Path)
    parser.add_argument("tuned", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    seconds = [read_limit((options.base, options.tuned), options.threads) for _ in range(options.rounds)]
    size = sum(path.stat().st_size for path in shards(options.base, options.tuned))
    rate = size / 1e9 / statistics.median(seconds)
    print(json.dumps({"bytes": size, "seconds": seconds, "gb_per_s": rate}))


if __name__ == "__main__":
    main()
