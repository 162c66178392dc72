"""Run the study, or go on with it, and print its report.

    python bench/opd_study/run.py --out build/opd_study                  # all of it: under an hour on two cores
    python bench/opd_study/run.py --out build/opd_study --minutes 10     # as much as fits; again to go on
    python bench/opd_study/run.py --out build/opd_quick --quick          # the pipeline, not the science

Every part leaves a JSON file in OUT/results; parts that are there are not done again. `--part` names some of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from report import report
from retraining import retraining
from settings import FULL, QUICK
from store import OutOfTimeError, Store
from surface import surface

PARTS = {"surface": surface, "retraining": retraining}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of results and checkpoints")
    parser.add_argument("--quick", action="store_true", help="a few seconds of everything")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; repeatable")
    parser.add_argument("--minutes", type=float, help="begin no further step after this")
    parser.add_argument("--threads", type=int, help="threads of torch")
    given = parser.parse_args(arguments)
    scale = QUICK if given.quick else FULL
    # Threads would spend more time on waiting for each other than on the tiny model.
    torch.set_num_threads(given.threads or (1 if given.quick else torch.get_num_threads()))
    store = Store(given.out, given.minutes)
    store.part("settings", lambda: {"quick": given.quick, "torch": torch.__version__})
    try:
        for name in given.part or PARTS:
            PARTS[name](store, scale)
    except OutOfTimeError as error:
        print(f"out of time before {error}; run it again to go on", file=sys.stderr)
    text = report(store, scale)
    (given.out / "report.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
