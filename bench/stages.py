"""What each stage of a diff costs: the stages are added one by one, each timed over the whole pair, in turns.

    python bench/stages.py BASE TUNED [--rounds N] [--threads N]

read: bytes into the buffers of the threads. scan: plus kernels and figures. mask: plus mask bits. compress: plus
deflate. write: plus the run file. Prints JSON: the seconds of every round.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np

from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.codes.fetch import FETCH
from ckptdiff.measure.partial import BLOCK, Partial, Scan
from ckptdiff.measure.source import Source, read_runs
from ckptdiff.options import MaskRule, Options
from ckptdiff.run import worker
from ckptdiff.run.devices import Device
from ckptdiff.run.engine import run
from ckptdiff.run.planning import Plan, prepare
from ckptdiff.run.schedule import Threads, execute


class ReadOnly:
    """A backend that looks at nothing."""

    def __init__(self) -> None:
        self._room = np.empty(FETCH * 8, np.uint8)

    def scan(self, scan: Scan, source: Source, partial: Partial, first_tie: int = 0) -> None:
        """Read every byte, in the pieces in which the kernels do."""
        partial.open_blocks(-(-source.numel // BLOCK), len(scan.thresholds))
        partial.numel += source.numel
        for window in source.windows():
            for runs, format in ((window.base, scan.base), (window.tuned, scan.tuned)):
                for first in range(window.first, window.stop, FETCH):
                    numel = min(FETCH, window.stop - first)
                    read_runs(runs, first, format.bits, self._room[: numel * format.bits // 8])

    def refine(self, *_: object) -> None:
        """Never needed, as nothing changed."""


def drain(plan: Plan) -> None:
    """Carry out a plan and drop what it finds."""
    with open_shards(plan.io) as shards, Threads(plan, shards) as threads:
        for _ in execute(plan, threads, lambda: None):
            pass


def stored(mask: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> list[tuple[bytes, int]]:
    """Stand in for compression."""
    return [(b"", 0)] * len(starts)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Time the stages of a diff.")
    parser.add_argument("base")
    parser.add_argument("tuned")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--scratch", type=Path, help="where the run file goes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        out = Path(folder, "run.h5")
        bare = prepare(given.base, given.tuned, options=Options(mask=MaskRule("none"), threads=given.threads))
        masked = prepare(given.base, given.tuned, out=out, options=Options(threads=given.threads))

        def without_compression() -> None:
            with mock.patch.object(worker, "compress_parts", stored):
                drain(masked)

        stages: dict[str, Callable[[], object]] = {
            "read": lambda: drain(replace(bare, device=Device("read", ReadOnly, batches=False))),
            "scan": lambda: drain(bare),
            "mask": without_compression,
            "compress": lambda: drain(masked),
            "write": lambda: run(given.base, given.tuned, out=out, options=masked.options),
        }
        seconds: dict[str, list[float]] = {name: [] for name in stages}
        for _ in range(given.rounds + 1):
            for name, stage in stages.items():
                begun = time.perf_counter()
                stage()
                seconds[name].append(time.perf_counter() - begun)
    print(json.dumps({name: rounds[1:] for name, rounds in seconds.items()}))


if __name__ == "__main__":
    main()
