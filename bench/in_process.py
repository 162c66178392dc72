"""Time the engine in one process beside the read limit, in turns, with the same number of threads.

    python bench/in_process.py BASE TUNED [--rounds N] [--threads N] [--scratch FOLDER]

Start-up, imports and compilation are left out: one untimed round comes first. "none" is `--mask none` without a
run file; "masks" writes a run file with the default masks. Prints JSON: the seconds of every round.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from read_limit import read_limit

from ckptdiff.options import MaskRule, Options
from ckptdiff.run.engine import run


def timed(base: Path, tuned: Path, out: Path | None, options: Options) -> float:
    """Seconds of one diff."""
    begun = time.perf_counter()
    run(str(base), str(tuned), out=out, options=options)
    took = time.perf_counter() - begun
    if out is not None:
        out.unlink()
    return took


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Time the engine in process beside the read limit.")
    parser.add_argument("base", type=Path)
    parser.add_argument("tuned", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--scratch", type=Path, help="where the run file goes")
    options = parser.parse_args()
    sides = (options.base, options.tuned)
    seconds: dict[str, list[float]] = {"read_limit": [], "none": [], "masks": []}
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        for _ in range(options.rounds + 1):
            seconds["read_limit"].append(read_limit(sides, options.threads))
            without = Options(mask=MaskRule.parse("none"), threads=options.threads)
            seconds["none"].append(timed(*sides, None, without))
            seconds["masks"].append(timed(*sides, Path(folder, "run.h5"), Options(threads=options.threads)))
    print(json.dumps({name: rounds[1:] for name, rounds in seconds.items()}))


if __name__ == "__main__":
    main()
