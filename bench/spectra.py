"""Accuracy and speed of the spectra, beside full decompositions and torch's and scikit-learn's randomized ones.

    python bench/spectra.py                              # everything; about an hour on two cores
    python bench/spectra.py --sections update,principal  # one matrix pair of 4096 x 11008
    python bench/spectra.py --quick                      # does it run at all?

Everything in a section runs in turns in one process, with the same number of threads, on the same matrices; what is
compared is checked too. `pair` and `memory` run whole commands.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import Section, show
from measure import machine
from spectra_accuracy import accuracy
from spectra_commands import memory, tiny, whole_pair
from spectra_products import products
from spectra_settings import Settings
from spectra_speed import exact, principal, update_alone

SECTIONS: Mapping[str, Callable[[Settings], Section]] = {
    "accuracy": accuracy,
    "products": products,
    "update": update_alone,
    "principal": principal,
    "exact": exact,
    "pair": whole_pair,
    "tiny": tiny,
    "memory": memory,
}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description="Measure the spectra beside full and randomized decompositions.")
    parser.add_argument(
        "--sections", type=lambda text: text.split(","), default=list(SECTIONS), help=",".join(SECTIONS)
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is run (3)")
    parser.add_argument("--exact-rounds", type=int, default=1, help="how often what takes minutes is run (1)")
    parser.add_argument("--trials", type=int, default=20, help="seeded trials of each kind of spectrum (20)")
    parser.add_argument(
        "--shape", type=int, nargs=2, default=(11008, 4096), help="of the timed matrices, tall (11008 4096)"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every library")
    parser.add_argument("--scratch", type=Path, help="where pairs are written")
    parser.add_argument("--json", type=Path, help="write all figures here too")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run at all?")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    options = arguments(argv)
    wanted = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    if any(os.environ.get(name) != count for name, count in wanted.items()):
        # They are read when NumPy and torch are loaded.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
    report: dict[str, Any] = {"machine": machine(), "threads": options.threads, "sections": {}}
    print(json.dumps(report["machine"], indent=1))
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        settings = Settings(
            *((900, 700) if options.quick else options.shape),
            rounds=1 if options.quick else options.rounds,
            threads=options.threads,
            trials=1 if options.quick else options.trials,
            trial_shape=(800, 660) if options.quick else (1600, 800),
            pair_size=1 << 20 if options.quick else 1_164_000_000,
            pair_shape=(64, 4) if options.quick else (2048, 10),
            tiny_size=1 << 21 if options.quick else 30_000 << 16,
            embedding=(900, 700) if options.quick else (151_936, 3_584),
            folder=Path(folder),
            exact_rounds=1 if options.quick else options.exact_rounds,
        )
        for name in options.sections:
            section = SECTIONS[name](settings)
            show(section)
            report["sections"][name] = asdict(section)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
