"""Measure ckptdiff beside the machine's own limits and its peers, in turns, and check that results agree.

    python bench/compare.py                          # everything at 2 GiB a side; needs 30 GB of disk, minutes
    python bench/compare.py --quick                  # the same at 1 MiB, in seconds; the figures mean nothing
    python bench/compare.py --sections main,cold --size 4GiB --pairs /data/pairs --json figures.json
    python bench/compare.py --sections memory --memory-sizes 1GiB 4GiB 8GiB
    python bench/compare.py --levels v3 --history figures.csv

Sections: main (bf16 pair: whole command, engine in process, read limit, torch diff, cmp), dtypes, tiny (30,000
tensors), memory, startup, cold (files out of the page cache), stages (what each stage of the kernel costs).
Everything is measured once with kernels for AVX2 (v3) and once with what else the processor has (v4: AVX-512); a line
for each goes to the history, which docs/speed.md shows. Times are medians; GB/s count both sides. The torch diff needs
torch==2.13.0 and is left out without it. Where /tmp is memory, cold means nothing: give --pairs on a disk.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import history
from harness import Bench, Section, show
from levels import chosen, environment, levels_here
from make_pair import parse_size
from measure import machine
from sections import SECTIONS, names


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description="Measure ckptdiff beside the machine's limits and its peers.")
    everything = ",".join(name for name in SECTIONS if name != "stages")
    parser.add_argument("--sections", type=names, default=names(everything), help=f"default: {everything}")
    parser.add_argument("--stages", action="store_true", help="add the cost of each stage of the kernel")
    parser.add_argument("--size", type=parse_size, default=2 << 30, help="a side of the main pair (2GiB)")
    parser.add_argument("--tiny-size", type=parse_size, default=1875 << 20, help="a side of 64 KiB tensors (1875MiB)")
    parser.add_argument("--memory-sizes", type=parse_size, nargs="+", default=[1 << 30], help="sides (1GiB)")
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is run (5)")
    parser.add_argument("--peer-rounds", type=int, default=3, help="how often the slow peers are run (3)")
    parser.add_argument("--pairs", type=Path, help="keep the synthetic pairs here and use them again")
    parser.add_argument("--scratch", type=Path, help="where run files go (default: beside the pairs)")
    there = levels_here()
    parser.add_argument("--levels", type=chosen, default=there, help=f"instruction sets ({','.join(there)})")
    parser.add_argument("--history", type=Path, help="add a line for each (bench/results/history.csv, unless --quick)")
    parser.add_argument("--json", type=Path, help="write all figures here too")
    parser.add_argument("--quick", action="store_true", help="1 MiB a side, one round: does it run at all?")
    return parser.parse_args(argv)


def as_json(section: Section) -> dict[str, Any]:
    """A section for the JSON file."""
    targets = [asdict(target) | {"met": target.met} for target in section.targets]
    return asdict(section) | {"targets": targets}


def measured(bench: Bench, names: Sequence[str], level: str) -> dict[str, Any]:
    """Sections by name, each shown as soon as it is there."""
    found = {}
    for name in names:
        section = SECTIONS[name](bench)
        show(replace(section, title=f"{section.title}; kernels for {level}"))
        found[name] = as_json(section)
    return found


@contextmanager
def only(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for all that is started within."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    options = arguments(argv)
    if options.quick:
        options.size, options.tiny_size, options.memory_sizes = 1 << 20, 1 << 20, [1 << 20]
        options.rounds = options.peer_rounds = 1
    if options.stages:
        options.sections = [*options.sections, "stages"]
    if options.history is None and not options.quick:
        options.history = history.HISTORY
    report: dict[str, Any] = {"machine": machine(), "levels": {}}
    print(json.dumps(report["machine"], indent=1))
    for folder in (options.scratch, options.pairs):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.scratch or options.pairs) as scratch:
        bench = Bench(
            pairs=options.pairs or Path(scratch),
            scratch=Path(scratch),
            size=options.size,
            tiny_size=options.tiny_size,
            memory_sizes=tuple(options.memory_sizes),
            rounds=options.rounds,
            peer_rounds=options.peer_rounds,
        )
        for level in options.levels:
            with only(environment(level)):
                report["levels"][level] = measured(bench, options.sections, level)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.history:
        lines = [history.line(report["machine"], *found, options.size) for found in report["levels"].items()]
        history.append(options.history, lines)
        print(f"added to {options.history}")


if __name__ == "__main__":
    main()
