"""Time of `track` over a base and five checkpoints, with and without --gram, beside the time of reading the six once.

    python bench/track_speed.py --size 1GiB

The steps go back and forth between a tuned checkpoint and the base, so that every counter has something to count; the
counts are checked. Medians over rounds, files in the page cache. Each round has an order of its own: whatever comes
after a reader that frees gigabytes is slower for it.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from make_pair import make_pair, parse_size
from read_limit import read_limit
from safetensors import safe_open

import ckptdiff
from ckptdiff.track import track

STEPS = ("tuned", "base", "tuned", "tuned", "base")
CHUNK = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="1GiB", help="bytes of each checkpoint")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--folder", type=Path, help="where to write them; a temporary folder by default")
    given = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        checkpoints = make(Path(folder), parse_size(given.size))
        check(*checkpoints[:2], track(checkpoints[0], checkpoints[1:], gram=True).overall())
        shards = [shard for path in checkpoints for shard in sorted(path.glob("*.safetensors"))]
        work: dict[str, Callable[[], object]] = {
            "read once, 1 thread": partial(read, shards, 1),
            f"read once, {threads} threads": partial(read, shards, threads),
            f"read limit, {threads} threads": partial(read_limit, checkpoints, threads),
            f"read into memory, {threads} threads": partial(read_whole, shards, threads),
            "load with safetensors": partial(load, shards),
            f"track --gram, {threads} threads": lambda: track(checkpoints[0], checkpoints[1:], gram=True),
            f"track, {threads} threads": lambda: track(checkpoints[0], checkpoints[1:]),
        }
        times: dict[str, list[float]] = {name: [] for name in work}
        shuffle = random.Random(0).sample
        for _ in range(given.rounds):
            for name in shuffle(list(work), len(work)):
                start = time.perf_counter()
                work[name]()
                times[name].append(time.perf_counter() - start)
    size = (1 + len(STEPS)) * parse_size(given.size)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, seconds in medians.items():
        print(f"{name:<30}{seconds:8.3f} s{size / seconds / 1e9:8.2f} GB/s")
    *others, ours = medians.values()
    for name, seconds in zip(medians, others, strict=False):
        print(f"track / {name}: {ours / seconds:.2f}")


def make(folder: Path, size: int) -> list[Path]:
    """A base and five steps, each with files of its own."""
    make_pair(size, folder)
    steps = []
    for number, source in enumerate(STEPS):
        steps.append(folder / f"step{number}")
        shutil.copytree(folder / source, steps[-1])
    return [folder / "base", *steps]


def read(shards: list[Path], threads: int) -> None:
    """Read whole files piece by piece into one buffer per thread: nothing is kept, the copies stay in the cache."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read_file, shards))


def read_whole(shards: list[Path], threads: int) -> None:
    """Read whole files into memory of their own, and forget them."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda shard: len(shard.read_bytes()), shards))


def load(shards: list[Path]) -> None:
    """Load one shard after the other, as a script would."""
    for shard in shards:
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                file.get_tensor(name).clone()


def read_file(path: Path) -> None:
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def check(base: Path, tuned: Path, rows: list[dict[str, int]]) -> None:
    """What the back and forth must count, from a diff."""
    diff = ckptdiff.diff(base, tuned)
    changed = int(diff.columns["numel"].sum() - diff.columns["unchanged_bitwise"].sum())
    expected = [
        (changed, changed, 0, 0),
        (0, 0, changed, 0),
        (changed, 0, 0, 0),
        (changed, 0, 0, 0),
        (0, 0, changed, 0),
    ]
    found = [(row["support"], row["touched"], row["reverted"], row["churned"]) for row in rows]
    assert found == expected, (found, expected)
    assert np.isclose(rows[0]["rel_norm"], diff.overall["rel_norm"], rtol=1e-6)
    # There and back again, on one line.
    assert [row["step_cosine"] and round(row["step_cosine"], 9) for row in rows] == [None, -1, -1, None, None]
    assert all(np.isclose(row[key], 1.0) for row in rows[1:] for key in ("rank1_share", "line_r2"))


if __name__ == "__main__":
    main()
