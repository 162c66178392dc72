"""Two installed versions of ckptdiff beside each other, in turns: what users wait for, and peak memory.

    python -m venv old && old/bin/python -m pip install /some/clone/of/the/older/version
    python -m venv new && new/bin/python -m pip install .
    python bench/between_versions.py old/bin/python new/bin/python --pairs /data/pairs

Sections: start (a fixture, warm and with nothing compiled yet), ending (from the last byte of a report to the end of
the process), whole (2 GiB a side, no masks), masks (the same with a run file), small (30,000 tensors of 64 KiB, with
masks), engine (in process, no masks, with the kernels of each level that the processor has), spectra (randomized, 1.16
GB a side). Each turn runs the older version and then the newer one. Seconds are medians, ratios medians of the turns'
ratios, newer / older, by the clock and by processor time. What both report of all weights together is compared, and
ends the script if it differs by more than 1e-9.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import Pair, files
from levels import environment, levels_here
from make_pair import make_pair, parse_size
from measure import machine, run, sequential_read, table, write_json

FIXTURE = Path(__file__).parent.parent / "fixtures" / "llama"
FIXTURE_PAIR = (FIXTURE / "base", FIXTURE / "tuned")
# What a version needs that neither a folder of sources nor the caller's settings may change.
OUTSIDE: dict[str, str] = {"PYTHONPATH": "", "PYTHONSAFEPATH": "1"}

# Prints the median seconds of one comparison, by the clock and of processors; the first one compiles and is not timed.
ENGINE = """
import json, statistics, sys, time
import ckptdiff
taken = []
for _ in range(int(sys.argv[4]) + 1):
    begun, spent = time.perf_counter(), time.process_time()
    ckptdiff.diff(sys.argv[1], sys.argv[2], mask="none", threads=int(sys.argv[3]), device="cpu")
    taken.append((time.perf_counter() - begun, time.process_time() - spent))
print(json.dumps([statistics.median(column) for column in zip(*taken[1:])]))
"""


@dataclass(frozen=True, slots=True)
class Took:
    """What one turn of one version took: seconds by the clock and of processors, bytes at its peak, its report."""

    seconds: float
    cpu: float | None
    peak_rss: int | None = None
    report: Mapping[str, Any] | None = None


Measure = Callable[[Path], Took]
"""Runs something once with the version of an interpreter."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Sizes, and where files go."""

    pairs: Path
    scratch: Path
    size: int
    small: int
    spectra: int
    threads: int

    def pair(self, name: str, size: int, **options: Any) -> Pair:
        """A synthetic pair, made once, and in the page cache."""
        folder = self.pairs / f"{name}-{size}"
        if not folder.exists():
            make_pair(size, folder, **options)
        pair = (folder / "base", folder / "tuned")
        sequential_read(files(pair))
        return pair

    def diff(self, pair: Pair, *options: str | Path, env: Mapping[str, str] | None = None) -> Measure:
        """The whole command on a pair."""

        def measure(python: Path) -> Took:
            words = ("diff", *pair, "--no-progress", "--format", "json", "--threads", str(self.threads), *options)
            took = run([python, "-m", "ckptdiff", *words], OUTSIDE | dict(env or {}))
            return Took(took.seconds, took.cpu, took.peak_rss, json.loads(took.output))

        return measure

    def diff_with_masks(self, pair: Pair) -> Measure:
        """The whole command with a run file and tables, as it is typed; figures are read from the file afterwards."""

        def measure(python: Path) -> Took:
            out = self.scratch / "run.h5"
            out.unlink(missing_ok=True)
            words = ("diff", *pair, "-o", out, "--no-progress", "--threads", str(self.threads))
            took = run([python, "-m", "ckptdiff", *words], OUTSIDE)
            shown = run([python, "-m", "ckptdiff", "show", out, "--format", "json"], OUTSIDE)
            return Took(took.seconds, took.cpu, took.peak_rss, json.loads(shown.output))

        return measure


def start(setting: Setting) -> dict[str, Measure]:
    """A fixture: what is left is starting, and for a first run compiling."""

    def first(python: Path) -> Took:
        with tempfile.TemporaryDirectory(dir=setting.scratch) as cache:
            return setting.diff(FIXTURE_PAIR, env={"CKPTDIFF_CACHE_DIR": cache})(python)

    return {"diff of a fixture": setting.diff(FIXTURE_PAIR), "the same, nothing compiled yet": first}


def ending(setting: Setting) -> dict[str, Measure]:
    """From the last byte of the report to the end of the process."""
    pair = setting.pair("llama", setting.size)

    def after(pair: Pair) -> Measure:
        def measure(python: Path) -> Took:
            command: list[str | Path] = [python, "-m", "ckptdiff", "diff", *pair, "--no-progress"]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | OUTSIDE)
            assert process.stdout is not None
            last = time.perf_counter()
            while os.read(process.stdout.fileno(), 1 << 16):
                last = time.perf_counter()
            if code := process.wait():
                raise SystemExit(f"{python} -m ckptdiff diff ended with {code}")
            return Took(time.perf_counter() - last, None)

        return measure

    return {"end after a fixture": after(FIXTURE_PAIR), f"end after {gib(setting.size)}": after(pair)}


def whole(setting: Setting) -> dict[str, Measure]:
    """The whole command without masks."""
    return {f"diff, {gib(setting.size)}": setting.diff(setting.pair("llama", setting.size), "--mask", "none")}


def masks(setting: Setting) -> dict[str, Measure]:
    """The whole command with a run file."""
    return {f"diff -o, {gib(setting.size)}": setting.diff_with_masks(setting.pair("llama", setting.size))}


def small(setting: Setting) -> dict[str, Measure]:
    """Very many small tensors with their masks."""
    pair = setting.pair("small", setting.small, tensors="tiny")
    return {f"diff -o, {setting.small >> 16:,} tensors of 64 KiB": setting.diff_with_masks(pair)}


def engine(setting: Setting) -> dict[str, Measure]:
    """The engine in process, with the kernels of each level."""
    pair = setting.pair("llama", setting.size)

    def at(level: str) -> Measure:
        def measure(python: Path) -> Took:
            words: list[str | Path] = [python, "-c", ENGINE, *pair, str(setting.threads), "5"]
            seconds, cpu = json.loads(run(words, OUTSIDE | environment(level)).output)
            return Took(seconds, cpu)

        return measure

    return {f"engine in process, {gib(setting.size)}, {level}": at(level) for level in levels_here()}


def spectra(setting: Setting) -> dict[str, Measure]:
    """Randomized spectra of a language model."""
    layers = (2048, 10) if setting.spectra > 1 << 29 else (64, 4)
    pair = setting.pair("spectra", setting.spectra, shape=layers)
    what = f"diff --spectra randomized, {setting.spectra / 1e9:.3g} GB a side"
    return {what: setting.diff(pair, "--spectra", "randomized", "--mask", "none")}


SECTIONS: Mapping[str, Callable[[Setting], dict[str, Measure]]] = {
    "start": start,
    "ending": ending,
    "whole": whole,
    "masks": masks,
    "small": small,
    "engine": engine,
    "spectra": spectra,
}


def gib(size: int) -> str:
    """A size as tables have it."""
    return f"{size / 2**30:.3g} GiB a side"


def check_alike(what: str, older: Mapping[str, Any] | None, newer: Mapping[str, Any] | None) -> None:
    """Compare what two versions report of all weights together, where both report it.

    Raises
    ------
    SystemExit
        If a figure differs by more than 1e-9 of it.
    """
    if older is None or newer is None:
        return
    first, second = (dict(leaves(report["global"])) for report in (older, newer))
    for key in first.keys() & second.keys():
        ours, theirs = second[key], first[key]
        same = math.isclose(ours, theirs, rel_tol=1e-9) if isinstance(theirs, float) else ours == theirs
        if not same:
            raise SystemExit(f"{what}: the versions disagree about {key}: {theirs} and {ours}")
    if not first.keys() & second.keys():
        raise SystemExit(f"{what}: the versions have no figure in common")


def leaves(figures: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """Figures of nested mappings under joined keys; spectral ones are left out, whose errors are larger."""
    found: list[tuple[str, Any]] = []
    for key, value in figures.items():
        if isinstance(value, Mapping):
            found += [] if key == "spectral" else leaves(value, f"{above}{key}.")
        else:
            found.append((above + key, value))
    return found


def in_turns(what: str, measure: Measure, pythons: tuple[Path, Path], rounds: int) -> dict[str, Any]:
    """One line of the table; a first turn warms caches and is not in it, unless it is the only one."""
    turns = [tuple(measure(python) for python in pythons) for _ in range(rounds + (rounds > 1))]
    for older, newer in turns:
        check_alike(what, older.report, newer.report)
    turns = turns[rounds > 1 :]
    row: dict[str, Any] = {"what": what}
    for name, side in (("older", 0), ("newer", 1)):
        row[f"{name}, s"] = statistics.median(turn[side].seconds for turn in turns)
        peaks = [turn[side].peak_rss for turn in turns]
        row[f"{name}, MB"] = max(peak for peak in peaks if peak is not None) / 1e6 if None not in peaks else None
    row["newer / older"] = statistics.median(newer.seconds / older.seconds for older, newer in turns)
    ratios = [newer.cpu / older.cpu for older, newer in turns if newer.cpu is not None and older.cpu is not None]
    row["by processor"] = statistics.median(ratios) if ratios else None
    return row


def version(python: Path) -> str:
    """The version that an interpreter has installed."""
    return run([python, "-c", "import ckptdiff; print(ckptdiff.__version__)"], OUTSIDE).output.strip()


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description="Two installed versions of ckptdiff beside each other, in turns.")
    parser.add_argument("older", type=Path, help="Python that has the older version installed")
    parser.add_argument("newer", type=Path, help="Python that has the newer one")
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"default: {','.join(SECTIONS)}")
    parser.add_argument("--rounds", type=int, default=5, help="turns (5)")
    parser.add_argument("--size", type=parse_size, default=2 << 30, help="a side of the main pair (2GiB)")
    parser.add_argument("--small", type=parse_size, default=1875 << 20, help="a side of small tensors (1875MiB)")
    parser.add_argument("--spectra", type=parse_size, default=1_164_000_000, help="a side of the pair with spectra")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--pairs", type=Path, help="keep the synthetic pairs here and use them again")
    parser.add_argument("--json", type=Path, help="write all figures here too")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    options = arguments(argv)
    sections = options.sections.split(",")
    if unknown := set(sections) - set(SECTIONS):
        raise SystemExit(f"no such section: {', '.join(sorted(unknown))} (there are {', '.join(SECTIONS)})")
    # Not resolved: an interpreter of a virtual environment is a link, and what it has depends on its place.
    pythons = (options.older.absolute(), options.newer.absolute())
    versions = [version(python) for python in pythons]
    print(f"older: {versions[0]}, newer: {versions[1]}; {machine()['processor']}, {options.threads} threads")
    if options.pairs is not None:
        options.pairs.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.pairs) as folder:
        scratch = Path(folder)
        sizes = (options.size, options.small, options.spectra)
        setting = Setting(options.pairs or scratch, scratch, *sizes, options.threads)
        for name in sections:
            for what, measure in SECTIONS[name](setting).items():
                rows.append(in_turns(what, measure, pythons, options.rounds))
                print(table("", rows[-1:]), flush=True)
    print(table("all", rows))
    if options.json:
        write_json(options.json, {"machine": machine(), "versions": versions, "rows": rows})


if __name__ == "__main__":
    main()
