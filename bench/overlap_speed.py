"""Time of `overlap` beside the time of reading the same masks, over two run files of a synthetic pair.

    python bench/overlap_speed.py --size 1GiB

Checks that the intersection equals that of the dense masks. Medians over rounds, taken in turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from make_pair import make_pair, parse_size

import ckptdiff
from ckptdiff.overlap import overlap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="1GiB", help="bytes of each side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write the pairs; a temporary folder by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        runs = [make_run(Path(folder), parse_size(given.size), rule) for rule in ("bitwise", "top:20")]
        check(runs)
        times: dict[str, list[float]] = {"read the masks": [], "overlap": []}
        for _ in range(given.rounds):
            for name, work in (("read the masks", read_masks), ("overlap", overlap)):
                start = time.perf_counter()
                work(runs)
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, seconds in medians.items():
        print(f"{name:<16}{seconds:8.3f} s")
    print(f"ratio           {medians['overlap'] / medians['read the masks']:8.2f}")


def make_run(folder: Path, size: int, rule: str) -> Path:
    """A run file of a pair that is made once."""
    if not (folder / "base").exists():
        make_pair(size, folder)
    out = folder / f"{rule.partition(':')[0]}.h5"
    ckptdiff.diff(folder / "base", folder / "tuned", out=out, mask=rule)
    return out


def read_masks(runs: list[Path]) -> int:
    """Decompress every mask of every run, piece by piece, as `overlap` reads them."""
    total = 0
    for path in runs:
        with ckptdiff.RunFile(path) as run:
            total += sum(piece.size for mask in run.masks.values() for piece in mask.iter_packed(1 << 20))
    return total


def check(runs: list[Path]) -> None:
    """Compare the largest tensor's intersection with NumPy's."""
    found = overlap(runs)
    row = max(found.grouped(found.pairs[0], "tensor"), key=lambda row: row["numel"])
    masks = []
    for path in runs:
        with ckptdiff.RunFile(path) as run:
            masks.append(run.masks[row["name"]].dense())
    assert row["masked_both"] == np.count_nonzero(masks[0] & masks[1])


if __name__ == "__main__":
    main()
