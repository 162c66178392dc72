"""Time of `track` over a base and five checkpoints, with and without --gram, beside the time of reading the six once.

    python bench/track_speed.py --size 1GiB

The steps go back and forth between a tuned checkpoint and the base, so that every counter has something to count; the
counts are checked. With --moved all of them are the tuned one, so that --gram has all products to make. Medians over
rounds, files in the page cache. Each round has an order of its own: whatever comes after a reader that frees gigabytes
is slower for it. With --patches it is instead the processor time and peak memory of `track --patches` beside those of
`track` and of `patch make` of each two neighbours, in processes of their own.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from make_pair import make_pair, parse_size
from measure import run
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
    parser.add_argument("--patches", action="store_true", help="compare patches made on the way")
    parser.add_argument("--moved", action="store_true", help="let every step differ from the base")
    given = parser.parse_args()
    steps = STEPS[:1] * len(STEPS) if given.moved else STEPS
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        checkpoints = make(Path(folder), parse_size(given.size), steps)
        if given.patches:
            compare_patches(Path(folder), checkpoints, given.rounds)
            return
        found = track(checkpoints[0], checkpoints[1:], gram=True)
        check(*checkpoints[:2], found.overall(), steps)
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
    size = (1 + len(steps)) * parse_size(given.size)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, seconds in medians.items():
        print(f"{name:<30}{seconds:8.3f} s{size / seconds / 1e9:8.2f} GB/s")
    *others, with_gram, ours = medians.values()
    for name, seconds in zip(medians, others, strict=False):
        print(f"track / {name}: {ours / seconds:.2f}")
    print(f"track --gram / track: {with_gram / ours:.2f}")


def compare_patches(folder: Path, checkpoints: Sequence[Path], rounds: int) -> None:
    """Print processor seconds and peak memory of one command for all, and of several; the first round compiles."""
    track_words = [sys.executable, "-m", "ckptdiff", "track", *map(str, checkpoints), "-q", "-O", os.devnull]
    spent: dict[str, list[float]] = {"track": [], "patch make, one by one": [], "track --patches": []}
    peaks = dict.fromkeys(spent, 0)

    def measured(name: str, words: Sequence[str]) -> float:
        done = run(list(words))
        peaks[name] = max(peaks[name], done.peak_rss)
        return done.processor

    for number in range(rounds + 1):
        taken = {"track": measured("track", track_words)}
        (folder / "alone").mkdir()
        taken["patch make, one by one"] = 0.0
        for place, pair in enumerate(pairwise(checkpoints), 1):
            target = folder / "alone" / f"patch_{place:06d}.ckptdelta"
            words = [sys.executable, "-m", "ckptdiff", "patch", "make", *map(str, pair), "-o", str(target), "-q"]
            taken["patch make, one by one"] += measured("patch make, one by one", words)
        taken["track --patches"] = measured("track --patches", [*track_words, "--patches", str(folder / "all")])
        for one in (folder / "alone").iterdir():
            assert one.read_bytes() == (folder / "all" / one.name).read_bytes(), one.name
        for made in ("alone", "all"):
            shutil.rmtree(folder / made)
        if number:
            for name, seconds in taken.items():
                spent[name].append(seconds)
    medians = {name: statistics.median(seconds) for name, seconds in spent.items()}
    for name, seconds in medians.items():
        print(f"{name:<30}{seconds:8.2f} s of a processor {peaks[name] / 1e6:8.0f} MB")
    alone, one_by_one, together = medians.values()
    print(f"together / one after the other: {together / (alone + one_by_one):.2f}")


def make(folder: Path, size: int, steps: Sequence[str]) -> list[Path]:
    """A base and its steps, each with files of its own."""
    make_pair(size, folder)
    made = [folder / "base"]
    for number, source in enumerate(steps):
        made.append(folder / f"step{number}")
        shutil.copytree(folder / source, made[-1])
    return made


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


def check(base: Path, tuned: Path, rows: list[dict[str, Any]], steps: Sequence[str]) -> None:
    """What the back and forth must count, from a diff; it never leaves one line."""
    diff = ckptdiff.diff(base, tuned)
    changed = int(diff.columns["numel"].sum() - diff.columns["unchanged_bitwise"].sum())
    before, ever, turned = 0, 0, None
    for source, row in zip(steps, rows, strict=True):
        now = changed if source == "tuned" else 0
        counts = (row["support"], row["touched"], row["reverted"], row["churned"])
        assert counts == (now, max(now - ever, 0), max(before - now, 0), 0), (counts, source)
        turn = row["step_cosine"] if row["step_cosine"] is None else round(row["step_cosine"], 9)
        assert turn == (-1 if now != before and turned else None), (turn, source)
        before, ever, turned = now, max(now, ever), now != before
    assert np.isclose(rows[0]["rel_norm"], diff.overall["rel_norm"], rtol=1e-6)
    assert all(np.isclose(row[key], 1.0) for row in rows[1:] for key in ("rank1_share", "line_r2"))


if __name__ == "__main__":
    main()
