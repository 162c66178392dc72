"""Run the study, or go on with it, and print its report.

    python bench/opd_study/run.py --out build/opd_study                  # all of it: under an hour on two cores
    python bench/opd_study/run.py --out build/opd_study --minutes 10     # as much as fits; again to go on
    python bench/opd_study/run.py --out build/opd_quick --quick          # the pipeline, not the science

Every step leaves a JSON file in OUT/results, and is not done again. The parts run beside each other, one thread each:
two threads are hardly faster on a model of this size.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from report import report
from retraining import retraining
from settings import FULL, QUICK
from store import OutOfTimeError, Store
from surface import prepare, surface

PARTS = {"surface": surface, "retraining": retraining}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of results and checkpoints")
    parser.add_argument("--quick", action="store_true", help="a few seconds of everything")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; repeatable")
    parser.add_argument("--minutes", type=float, help="begin no further step after this")
    given = parser.parse_args(arguments)
    scale = QUICK if given.quick else FULL
    torch.set_num_threads(1)
    store = Store(given.out, given.minutes)
    try:
        prepare(store, scale, scale.widths[0])
        if given.part or given.quick:
            for name in given.part or PARTS:
                PARTS[name](store, scale)
        else:
            run_beside_each_other(sys.argv[1:] if arguments is None else arguments)
    except OutOfTimeError as error:
        print(f"out of time before {error}; run it again to go on", file=sys.stderr)
    if given.part and not given.quick:
        return 0
    text = report(store, scale)
    (given.out / "report.md").write_text(text)
    print(text)
    return 0


def run_beside_each_other(arguments: list[str]) -> None:
    """Each part in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    parts = [subprocess.Popen([*command, "--part", name]) for name in PARTS]
    failed = [part.args for part in parts if part.wait()]
    if failed:
        raise SystemExit(f"failed: {failed}")


if __name__ == "__main__":
    sys.exit(main())
