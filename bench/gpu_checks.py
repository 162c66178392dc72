"""Is what a GPU counts right? Each word is a program of its own, which ends with 1 if something differs.

    python bench/gpu_checks.py machine            # what is installed, and which GPU there is
    python bench/gpu_checks.py kernels [--quick]  # every kernel on every code, beside the NumPy reference
    python bench/gpu_checks.py tests              # the tests that need a GPU
    python bench/gpu_checks.py runs PAIR...       # whole runs with both devices, their run files compared
    python bench/gpu_checks.py tight              # a GPU with too little free memory for the usual buffers
    python bench/gpu_checks.py compile [PAIR...]  # needs no GPU: the CPU backend's kernels, by many processes

PAIR is a folder with base/ and tuned/. `--figures FILE` keeps what is found as JSON, from the first row on.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu_machine import machine_rows
from measure import write_json

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "cuda" / "test_on_gpu.py"
RULES = ("abs:1e-05", "top:10")
SUMS = {
    "delta_norm": ("delta_norm",),
    "base_norm": ("base_norm",),
    "l1": ("l1",),
    "delta_sum": ("l1",),
    "base_dot_delta": ("base_norm", "delta_norm"),
}
"""Columns that are sums or roots of sums, and those whose product says how large the terms were that were added."""
Row = dict[str, Any]

sys.path[:0] = [str(ROOT / "tests" / "cuda"), str(ROOT / "tests")]


def kernel_rows(some: int, quick: bool) -> Iterator[Row]:
    """All six kernels: every code of narrow formats, random bits of wide ones, casts, ties, open cuts, codes to decode.

    `some` coordinates make a scan that is random; `quick` is for a sanitizer, under which kernels take long.
    """
    import numpy as np
    from code_samples import random_codes
    from worker_checks import check, check_refine, sides

    from ckptdiff.formats import FORMATS
    from ckptdiff.measure.cuda import choice
    from ckptdiff.measure.cuda.backend import CudaBackend
    from ckptdiff.measure.cuda.slots import Room
    from ckptdiff.measure.partial import Rule, Scan
    from ckptdiff.measure.self_test import decoding_test

    worker = CudaBackend(choice.find_gpu(0), Room.smallest() if quick else Room())
    rng = np.random.default_rng(0)

    def case(what: str, names: tuple[str, ...], act: Any) -> Row:
        begun = time.perf_counter()
        found = "equal"
        try:
            act()
        except Exception as error:  # whatever it is, the next kernels may do
            traceback.print_exc()
            found = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        took = time.perf_counter() - begun
        return {"kernels": what, "formats": "-".join(names), "found": found, "seconds": took, "wrong": found != "equal"}

    def scans(names: tuple[str, str, str]) -> None:
        formats = [FORMATS[name] for name in names]
        every = [(Rule.BITWISE, 0.0)] if quick else [(Rule.BITWISE, 0.0), (Rule.ABOVE, 1e-5), (Rule.ETA, 4e-3)]
        pairs = [sides(*formats[:2], some, 1, "tame"), sides(*formats[:2], some, 2, "wild")]
        if formats[0].bits <= 16:
            codes = (np.arange(1 << 16) % (1 << formats[0].bits)).astype(formats[0].code_dtype)
            high = (np.arange(1 << 16) >> 16 - formats[1].bits).astype(formats[1].code_dtype)
            pairs.append((codes, high if formats[1].bits < 16 else random_codes(formats[1], 1 << 16, rng, "wild")))
            if formats[0] == formats[1]:
                pairs += [(codes, np.roll(codes, 1)), (codes, codes[::-1].copy())]
        for base, tuned in pairs:
            for rule, cut in every:
                check(worker, Scan(*formats, (0.0, 1e-8, 1e-5, 1e-4), 1e-3, rule, cut, want_mask=True), base, tuned)

    def ties(name: str) -> None:
        format = FORMATS[name]
        one, two = (np.array(value, np.float32).view(np.uint32) for value in (1.0, 2.0))
        shift = 16 if name == "bf16" else 0
        tuned = rng.choice(np.array([0, 0, one >> shift, two >> shift], format.code_dtype), some)
        count = int(np.count_nonzero(tuned == one >> shift))
        for take in (0, count // 3, count):
            scan = Scan(format, format, format, (1e-5,), 1e-3, Rule.TOP, 1.0, count, take, want_mask=True)
            check(worker, scan, np.zeros(some, format.code_dtype), tuned)

    def codes() -> None:
        wrong = decoding_test(worker)
        assert wrong is None, wrong

    def cuts(name: str) -> None:
        check_refine(worker, FORMATS[name], *sides(FORMATS[name], FORMATS[name], some))

    triples: list[tuple[str, str, str]] = [
        ("bf16",) * 3,
        ("f16",) * 3,
        ("f8_e4m3",) * 3,
        ("f8_e5m2",) * 3,
        ("f32",) * 3,
    ]
    if not quick:
        triples += [("f32", "bf16", "bf16"), ("f64",) * 3, ("f8_e4m3", "f8_e5m2", "bf16"), ("bf16", "f16", "f32")]
    for names in triples[:1] if quick else triples:
        yield case("scan, harvest", names, lambda: scans(names))  # noqa: B023
    yield case("decode, scan", ("e4m3", "e5m2", "integers"), codes)
    for name in ("f32",) if quick else ("f32", "bf16"):
        yield case("scan, place_ties, take_ties", (name,), lambda: ties(name))  # noqa: B023
    for name in ("f32",) if quick else ("f32", "bf16", "f16"):
        yield case("refine, harvest", (name,), lambda: cuts(name))  # noqa: B023


def pytest_rows(given: list[str]) -> Iterator[Row]:
    """The tests of the GPU, by as many workers as are worth it; one that is skipped for want of a GPU has failed."""
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "junit.xml")
        plugins = []
        if importlib.util.find_spec("xdist"):
            plugins += ["-n", str(min(12, len(os.sched_getaffinity(0))))]
        if importlib.util.find_spec("pytest_timeout"):
            plugins += ["--timeout", "90"]
        os.environ["CKPTDIFF_NEED_GPU"] = "1"
        how = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-o", "junit_family=xunit1", "--tb=short"]
        code = int(pytest.main([*how, f"--junitxml={report}", *plugins, *given, str(TESTS)]))
        if not report.exists():
            yield {"tests": 0, "wrong": True, "ended with": code}
            return
        suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    for broken in suite.iter("testcase"):
        if any(broken.find(kind) is not None for kind in ("failure", "error", "skipped")):
            yield {"failed test": broken.get("name"), "wrong": True}
    yield {**counts, "workers": plugins[1] if plugins[:1] == ["-n"] else 1, "wrong": code != 0 or not counts["tests"]}


def run_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Run both devices over pairs in this process; their run files must be alike."""
    import ckptdiff

    ways = [dict(way.partition("=")[::2] for way in text.split(",") if way) for text in options.ways]
    for pair in options.pairs:
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            for rule in options.rules:
                for number, way in enumerate(ways or [{}]):
                    given = {**{"threads": options.threads, "mask": rule}, **way}
                    given["threads"] = int(given["threads"])
                    row: Row = {"pair": pair.name, **{name: str(value) for name, value in given.items()}}
                    files = {}
                    for device in ("cpu", "cuda"):
                        files[device] = Path(folder, f"{device}-{rule}-{number}.h5")
                        for when in ("first", "again")[: options.rounds]:
                            begun = time.perf_counter()
                            ckptdiff.diff(pair / "base", pair / "tuned", out=files[device], device=device, **given)
                            row[f"{device}, {when} s"] = time.perf_counter() - begun
                    yield row | compared(files["cuda"], files["cpu"])
                    for path in files.values():
                        path.unlink()


def compared(got: Path, expected: Path) -> Row:
    """What differs between two run files: names of datasets, and the largest relative difference of a sum."""
    import numpy as np
    from run_files import datasets

    found, right = datasets(got), datasets(expected)
    wrong = sorted(found.keys() ^ right.keys())
    largest = 0.0
    for name in sorted(found.keys() & right.keys() - {"provenance"}):
        value, chunks, attributes = found[name]
        other, other_chunks, other_attributes = right[name]
        if (chunks, attributes, value.shape) != (other_chunks, other_attributes, other.shape):
            wrong.append(name)
        elif value.dtype.kind == "f":
            scale = np.abs(other)
            if terms := SUMS.get(name.removeprefix("tensors/")):
                scale = np.prod([right[f"tensors/{term}"][0] for term in terms], axis=0)
            with np.errstate(invalid="ignore", divide="ignore"):
                off = np.where(value == other, 0.0, np.abs(value - other) / scale)
            off = np.where(np.isnan(value) & np.isnan(other), 0.0, off)
            worst = float(np.max(np.nan_to_num(off, nan=np.inf), initial=0.0))
            largest = max(largest, worst)
            # Shares of an energy are quotients of such sums.
            if not worst <= (1e-12 if terms else 1e-11):
                wrong.append(name)
        elif not np.array_equal(value, other):
            wrong.append(name)
    tensors = right["tensors/numel"][0].size
    masks = sum(name.startswith("masks/") for name in right)
    differ = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
    return {
        "tensors": tensors,
        "masks": masks,
        "differ": differ or "nothing",
        "sums off by": largest if math.isfinite(largest) else "any amount",
        "wrong": bool(wrong),
    }


def tight_rows() -> Iterator[Row]:
    """Take nearly all memory of the GPU, and see a worker make do with less."""
    from worker_checks import check, sides

    from ckptdiff.formats import FORMATS
    from ckptdiff.measure.cuda import choice
    from ckptdiff.measure.cuda.backend import CudaBackend
    from ckptdiff.measure.cuda.slots import Room
    from ckptdiff.measure.partial import Rule, Scan

    gpu, bf16 = choice.find_gpu(0), FORMATS["bf16"]
    scan = Scan(bf16, bf16, bf16, (0.0, 1e-5), 1e-3, Rule.ABOVE, 1e-5, want_mask=True)
    small = CudaBackend(gpu, Room.smallest())  # whose kernels are loaded while there is room
    check(small, scan, *sides(bf16, bf16, 100_000))
    held, left, step = [], Room().gpu_bytes * 3 // 4, 1 << 30
    while step >= 1 << 20:
        try:
            if gpu.free_memory()[0] - step >= left:
                held.append(gpu.empty(step))
                continue
        except MemoryError:
            pass
        step //= 2
    free = gpu.free_memory()[0]
    worker = CudaBackend(gpu, Room())
    check(worker, scan, *sides(bf16, bf16, 1_000_000))
    wanted, taken = Room().gpu_bytes, worker._pipeline.room.gpu_bytes
    yield {
        "free MiB": free >> 20,
        "wanted MiB": wanted >> 20,
        "taken MiB": taken >> 20,
        "counts": "equal",
        "wrong": taken >= wanted,
    }


def compile_rows(pairs: list[Path], more: list[str], nice: int) -> Iterator[Row]:
    """Have the kernels of these pairs, of bf16 and of `more` formats compiled, by a process a core."""
    from ckptdiff.checkpoint import Kind, open_checkpoint, pair
    from ckptdiff.formats import FORMATS, Formats, formats_of
    from ckptdiff.measure.cpu import CpuBackend
    from ckptdiff.run import warm_up

    bf16 = FORMATS["bf16"]
    formats: set[Formats] = {(bf16, bf16, bf16)}
    for names in more:
        base, tuned, compare = names.split("-")
        formats.add((FORMATS[base], FORMATS[tuned], FORMATS[compare]))
    for folder in pairs:
        for one in pair(open_checkpoint(str(folder / "base")), open_checkpoint(str(folder / "tuned"))).pairs:
            if one.base.kind is Kind.FLOAT:
                formats.add(formats_of(one.base.dtype, one.tuned.dtype, "bf16"))
    warm_up._AT_ONCE = len(os.sched_getaffinity(0))  # nobody is waiting for their memory
    os.nice(nice)
    asked = warm_up.uses({(bf16, bf16, bf16)}, formats, 1 << 17, ["decoded"])
    begun = time.perf_counter()
    warm_up.load(CpuBackend(), asked, lambda event: print(event, flush=True))
    yield {"kernels of the CPU backend": len(asked.certain), "seconds": time.perf_counter() - begun}


def rows_of(options: argparse.Namespace) -> Iterator[Row]:
    """What was asked for."""
    if options.what == "kernels":
        return kernel_rows(options.coordinates, options.quick)
    if options.what == "tests":
        return pytest_rows(options.given)
    if options.what == "runs":
        return run_rows(options)
    if options.what == "compile":
        return compile_rows(options.pairs, options.formats, options.nice)
    return machine_rows() if options.what == "machine" else tight_rows()


def main() -> int:
    """Command line entry; returns 1 if a row is wrong."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--figures", type=Path, help="keep the rows here as JSON, from the first one on")
    parser = argparse.ArgumentParser(description="Compare what a GPU counts with what the processor counts.")
    asked = parser.add_subparsers(dest="what", required=True)
    for name in ("machine", "tight"):
        asked.add_parser(name, parents=[common])
    compiles = asked.add_parser("compile", parents=[common])
    compiles.add_argument("pairs", nargs="*", type=Path, help="whose kernels are compiled")
    compiles.add_argument("--formats", nargs="*", default=[], help="more of them, such as f32-bf16-bf16")
    compiles.add_argument("--nice", type=int, default=0, help="run at a lower priority")
    kernels = asked.add_parser("kernels", parents=[common])
    kernels.add_argument("--quick", action="store_true", help="a few small scans, for a sanitizer")
    kernels.add_argument("--coordinates", type=int, default=400_007, help="of a random scan")
    tests = asked.add_parser("tests", parents=[common])
    tests.add_argument("given", nargs="*", help="more for pytest, after --")
    runs = asked.add_parser("runs", parents=[common])
    runs.add_argument("pairs", nargs="+", type=Path)
    runs.add_argument("--rules", nargs="+", default=RULES, help="mask rules")
    runs.add_argument("--ways", nargs="+", default=[], help="options of runs, such as io=mmap,gpu_memory=200M")
    runs.add_argument("--rounds", type=int, default=1, choices=(1, 2))
    runs.add_argument("--threads", type=int, default=4)
    runs.add_argument("--scratch", type=Path, help="where run files are written")
    options = parser.parse_args()
    rows: list[Row] = []
    for row in rows_of(options):
        rows.append(row)
        cells = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
        )
        print(*cells, sep="; ", flush=True)
        if options.figures:
            write_json(options.figures, {"rows": rows})
    return 1 if any(row.get("wrong") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
