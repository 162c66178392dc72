"""The steps of both calls of `on_gpu.py`: what is asked of a GPU, and in which sizes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantised_pair import LAYOUTS
from steps import GUARD, ROOT, Step

BENCH = Path(__file__).absolute().parent


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes
    ----------
    pair : int
        Bytes of a side of the large pair.
    tiny, tiny_bytes : int
        Small tensors, and bytes of each.
    mixed, quantised, rates, kernels : int
        Bytes of a side of other data.
    coordinates : int
        Of a scan that is compared with the reference.
    rounds, tiny_rounds : int
    threads : tuple of int
        The most come last.
    fixtures : tuple of str
        Those that are compared, and whose kernels are compiled.
    rules : tuple of str
        Mask rules with which they are compared.
    ways : tuple of str
        Options of runs whose files are compared, beside the usual ones.
    formats : tuple of str
        Those that other pairs and `doctor` are compared in, as base, tuned side and comparison, beside bf16.
    tests, spectra : tuple of str
        More for pytest, and for `gpu_spectra.py`.
    nice : int
        How far the compilers of the CPU backend's kernels stand back, not to disturb what is timed beside them.
    """

    pair: int = 16 << 30
    tiny: int = 1200
    tiny_bytes: int = 64 << 10
    mixed: int = 256 << 20
    quantised: int = 256 << 20
    rates: int = 512 << 20
    kernels: int = 256 << 20
    coordinates: int = 150_007
    rounds: int = 5
    tiny_rounds: int = 2
    threads: tuple[int, ...] = (1, 4, 16)
    fixtures: tuple[str, ...] = tuple(sorted(base.parent.name for base in (ROOT / "fixtures").glob("*/base")))
    rules: tuple[str, ...] = ("abs:1e-05", "top:10")
    ways: tuple[str, ...] = (
        "io=mmap,threads=8",
        "gpu_memory=64M",
        "mask=rel:0.001",
        "mask=eta:0.001",
        "compare=stored,mask=top:5",
    )
    formats: tuple[str, ...] = ("f32-f32-bf16", "f32-bf16-bf16", "f32-bf16-f32", "f32-f32-f32", "f64-f64-f64")
    tests: tuple[str, ...] = ()
    spectra: tuple[str, ...] = ()
    nice: int = 10


REAL = {"a": Sizes(), "b": Sizes(tiny=30_000, threads=(1, 2, 4, 8, 16))}
SMALL = Sizes(
    pair=1 << 20,
    tiny_bytes=512,
    mixed=1 << 18,
    quantised=1 << 18,
    rates=1 << 20,
    kernels=1 << 19,
    coordinates=40_007,
    rounds=1,
    tiny_rounds=1,
    threads=(1, 2),
    fixtures=("moe", "tied"),
    rules=("top:10",),
    ways=("io=mmap,threads=3,gpu_memory=64M,mask=top:5",),
    formats=("f32-f32-bf16", "f32-bf16-bf16"),
    tests=("-k", "tight and bf16-bf16-bf16 and not large"),
    spectra=("--small", "--first", "2"),
    nice=0,
)


TO_CUDA = ("--device", "cuda", "--no-progress")


def check(word: str, *given: object) -> tuple[str, ...]:
    """A command of `gpu_checks.py`."""
    return (str(BENCH / "gpu_checks.py"), word, "--figures", "{figures}", *map(str, given))


def speed(word: str, *given: object) -> tuple[str, ...]:
    """A command of `gpu.py`."""
    return (str(BENCH / "gpu.py"), word, "--figures", "{figures}", *map(str, given))


def preparations(sizes: Sizes, scratch: Path) -> list[Step]:
    """What is started at second 0 and needs no GPU."""
    make, processes = str(BENCH / "make_pair.py"), str(min(8, os.cpu_count() or 1))
    tiny = (str(sizes.tiny * sizes.tiny_bytes), str(scratch / "tiny"), "--tensors", "tiny")
    mixed = (str(sizes.mixed), str(scratch / "mixed"), "--dtype", "mixed")
    quantised = (str(BENCH / "quantised_pair.py"), str(sizes.quantised), str(scratch / "quantised"))
    large = (str(sizes.pair), str(scratch / "pair"), "--processes", processes)
    return [
        Step(
            "CPU kernels",
            "compiled, a process a core",
            check("compile", *paths_of(sizes.fixtures), "--formats", *sizes.formats, "--nice", sizes.nice),
            150,
            title="Preparations",
        ),
        Step("tiny pair", "written", (make, *tiny, "--tensor-bytes", str(sizes.tiny_bytes)), 120),
        Step("mixed pair", "written", (make, *mixed), 60),
        Step("quantised pairs", "written", quantised, 60),
        Step("large pair", "written", (make, *large), 150),
    ]


def first_steps(sizes: Sizes) -> list[Step]:
    """What both calls begin with."""
    return [
        Step("machine", "which GPU, driver and packages", check("machine"), 30, title="Machine"),
        Step(
            GUARD,
            "do all six kernels count what NumPy counts, on every code of f16, e4m3, e5m2 and bf16",
            check("kernels", "--coordinates", sizes.coordinates),
            60,
            title="Kernels beside the reference",
        ),
    ]


def call_a(sizes: Sizes, scratch: Path) -> list[Step]:
    """Is it right, and how fast."""
    runs, compiled = "Whole runs, both devices", ("CPU kernels",)
    one_rule, most = ("--scratch", scratch, "--rules", "abs:1e-05"), sizes.threads[-1]
    again = ("--rounds", sizes.tiny_rounds)
    return [
        *first_steps(sizes),
        *starts(scratch),
        Step(
            "tests",
            "do the tests of the GPU pass",
            check("tests", "--", *sizes.tests),
            75,
            title="Tests",
            after=compiled,
        ),
        Step("doctor", "what a user is told", ("-m", "ckptdiff", "doctor"), 30, after=compiled),
        Step(
            "fixtures",
            "are run files of both devices alike",
            check("runs", *paths_of(sizes.fixtures), "--scratch", scratch, "--rules", *sizes.rules),
            45,
            title=runs,
            after=compiled,
        ),
        Step(
            "small tensors",
            f"are {sizes.tiny} small tensors, many to a launch, measured alike, and how fast",
            check("runs", scratch / "tiny", *one_rule, *again),
            40,
            title=runs,
            after=("tiny pair", *compiled),
        ),
        Step(
            "quantised",
            "are codes with scales decoded and counted alike, fp8 and NVFP4, and how fast",
            check("runs", *(scratch / "quantised" / name for name in LAYOUTS), *one_rule, *again),
            60,
            title=runs,
            after=("quantised pairs", *compiled),
        ),
        whole(sizes, scratch, "cuda", most),
        whole(sizes, scratch, "cpu", most),
        Step(
            "rates",
            "how fast are memory, bus, kernel and one thread alone",
            speed("rates", "--size", sizes.rates, "--rounds", sizes.rounds, "--scratch", scratch),
            45,
            title="Rates",
            after=compiled,
            times=True,
        ),
        whole(sizes, scratch, "cuda", most, masks=True),
        whole(sizes, scratch, "cpu", most, masks=True),
        *(whole(sizes, scratch, "cuda", threads) for threads in sizes.threads[-2::-1]),
    ]


def call_b(sizes: Sizes, scratch: Path) -> list[Step]:
    """What speed depends on, what else may go wrong, and what the tools of CUDA say."""
    most, compiled = sizes.threads[-1], ("CPU kernels",)
    one_rule = ("--scratch", scratch, "--rules", "abs:1e-05")
    few_scans = (*check("kernels")[:2], "--quick", "--coordinates", "40007")
    every_process = ("--target-processes", "all")
    sanitizer = ("compute-sanitizer", *every_process, "--error-exitcode", "9", "--report-api-errors", "no", "--tool")
    profiler = ("ncu", *every_process, "--clock-control", "none", "-k", "regex:^scan$", "-c", "1")
    for section in ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "InstructionStats", "WarpStateStats"):
        profiler += ("--section", section)
    # Steps that need nothing of the CPU backend first: its kernels are still being compiled.
    return [
        *first_steps(sizes),
        Step(
            "hard data",
            "how slow is the scan kernel where its additions meet in few bins",
            speed("kernels", "--size", sizes.kernels, "--rounds", sizes.rounds),
            45,
            title="Scan kernel over easy and hard data",
            times=True,
        ),
        Step("tight", "does a full GPU get smaller buffers", check("tight"), 30, title="A GPU that is nearly full"),
        Step("memcheck", "does a kernel leave its buffers", few_scans, 60, under=(*sanitizer, "memcheck")),
        *(whole(sizes, scratch, "cuda", most, masks, memory) for masks in (False, True) for memory in ("8G", "")),
        *(whole(sizes, scratch, "cpu", most, masks, memory) for masks in (False, True) for memory in ("8G", "")),
        Step(
            "small tensors",
            f"are {sizes.tiny} small tensors measured alike, and how fast",
            check("runs", scratch / "tiny", *one_rule, "--rounds", sizes.tiny_rounds, "--threads", most),
            90,
            title="Whole runs, both devices",
            after=("tiny pair", *compiled),
        ),
        Step(
            "ways",
            "are run files alike with mapped files, little GPU memory, and rules that take a second pass",
            check("runs", scratch / "mixed", *one_rule, "--ways", *sizes.ways),
            45,
            title="Whole runs, both devices",
            after=("mixed pair", *compiled),
        ),
        Step(
            "spectra",
            "are spectra alike on both devices, and how fast beside torch's eigenproblems",
            (str(BENCH / "gpu_spectra.py"), "--figures", "{figures}", "--scratch", str(scratch / "s"), *sizes.spectra),
            120,
            least=60,
            title="Spectra",
            after=compiled,
            times=True,
        ),
        Step("racecheck", "do threads race for shared memory", few_scans, 75, under=(*sanitizer, "racecheck")),
        Step(
            "profile",
            "what holds the scan kernel",
            (str(BENCH / "gpu.py"), "kernels", "--size", str(min(sizes.kernels, 64 << 20)), "--rounds", "1"),
            60,
            under=profiler,
        ),
        *(
            whole(sizes, scratch, "cuda", threads, masks)
            for threads in sizes.threads[-2::-1]
            for masks in (False, True)
        ),
        Step(
            "command",
            "how long does the whole command take, from its start to its end",
            ("-m", "ckptdiff", "diff", *sides(scratch / "pair"), "-o", str(scratch / "command.h5"), *TO_CUDA),
            60,
            after=("large pair", *compiled),
            times=True,
        ),
    ]


def paths_of(fixtures: Sequence[str]) -> list[Path]:
    """Where they lie."""
    return [ROOT / "fixtures" / name for name in fixtures]


def sides(pair: Path) -> tuple[str, str]:
    """Both sides of a pair."""
    return str(pair / "base"), str(pair / "tuned")


def whole(sizes: Sizes, scratch: Path, device: str, threads: int, masks: bool = False, memory: str = "8G") -> Step:
    """Runs over the large pair."""
    given = ["--device", device, "--threads", threads, "--rounds", 1 if threads == 1 else min(sizes.rounds, 2)]
    given += ["--masks"] * masks + (["--max-memory", memory] if memory else [])
    how = f"{device}, {threads} threads, {'masks' if masks else 'statistics'}, {memory or 'default memory'}"
    return Step(
        f"whole: {how}",
        "how fast is a whole run",
        speed("whole", *sides(scratch / "pair"), *given),
        60,
        least=10,
        title="Whole runs over the large pair",
        after=("large pair", "CPU kernels"),
        times=True,
    )


def starts(scratch: Path) -> Iterator[Step]:
    """What happens once in a process, before and after kernels for the GPU were kept."""
    for which in ("first", "later"):
        yield Step(
            f"{which} start",
            "what do context, compiler, pinned memory and the first scan take",
            speed("start"),
            45,
            title=f"The {which} process",
            times=True,
            env=(("CKPTDIFF_CACHE_DIR", str(scratch / "kept")),),
        )


CALLS = {"a": call_a, "b": call_b}
