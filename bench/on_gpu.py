"""All that the first run on a GPU has to answer, in two calls of minutes, from the tree, installing nothing.

    PYTHONPATH=. python3 bench/on_gpu.py --call a --out DIR    # 4 minutes: is it right, and how fast
    PYTHONPATH=. python3 bench/on_gpu.py --call b --out DIR    # 6 minutes: what it depends on, and the sanitizers
    PYTHONPATH=. python3 bench/on_gpu.py --rehearse --out DIR  # both, small, without a GPU

Each step is a process of its own with a time limit; what is over its limit is killed with all it started, and the rest
goes on. DIR/call-a.json is whole at any moment and holds what was found so far, DIR/call-a.log what the steps printed,
DIR/call-a.md the tables. The exit code is 0 if every step passed. `GPU.md` says what each step answers.

If the kernels count wrong, steps that only time them are skipped; those that say what else is wrong are not. When time
runs out the last steps are skipped: the most important come first. A rehearsal takes the same steps in the same way,
but for sizes and for the device: `host_device.py` puts the tests' host device in the place of a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measure import machine, markdown, write_json

BENCH = Path(__file__).absolute().parent
ROOT = BENCH.parent
BUDGET = {"a": 240.0, "b": 360.0}
RESERVE = 8.0
"""Seconds kept for the tables and for removing the pairs."""
TAIL = 4000
"""Characters of output kept in the figures, the last ones."""
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes
    ----------
    pair : int
        Bytes of a side of the large pair.
    tiny, tiny_bytes : int
        Small tensors, and bytes of each.
    mixed, rates, kernels : int
        Bytes of a side of other data.
    coordinates : int
        Of a scan that is compared with the reference.
    rounds, tiny_rounds : int
    threads : tuple of int
        The most come last.
    rules : tuple of str
        Mask rules with which the fixtures are compared.
    tests : tuple of str
        More for pytest.
    """

    pair: int = 16 << 30
    tiny: int = 1200
    tiny_bytes: int = 64 << 10
    mixed: int = 256 << 20
    rates: int = 512 << 20
    kernels: int = 256 << 20
    coordinates: int = 400_007
    rounds: int = 5
    tiny_rounds: int = 2
    threads: tuple[int, ...] = (1, 4, 16)
    rules: tuple[str, ...] = ("abs:1e-05", "top:10")
    tests: tuple[str, ...] = ()


REAL = {"a": Sizes(), "b": Sizes(tiny=30_000, threads=(1, 2, 4, 8, 16))}
SMALL = Sizes(
    pair=1 << 20,
    tiny_bytes=512,
    mixed=1 << 18,
    rates=1 << 20,
    kernels=1 << 19,
    coordinates=40_007,
    rounds=1,
    tiny_rounds=1,
    threads=(1, 2),
    rules=("top:10",),
    tests=("-k", "tight and not large and not top"),
)


@dataclass(frozen=True, slots=True)
class Step:
    """One process.

    Attributes
    ----------
    name : str
    asks : str
        The question it answers.
    command : tuple of str
        After the interpreter; "{figures}" stands for the file it keeps its figures in.
    limit : float
        Seconds after which it is killed.
    least : float
        Seconds that must be left for it to be worth starting.
    title : str
        Heading of its figures; steps with the same one share a table.
    after : tuple of str
        Preparations that have to be complete.
    times : bool
        Whether it only times the kernels, so that it means nothing if they count wrong.
    under : tuple of str
        A program to run it under, with its options.
    env : tuple of (name, value)
    """

    name: str
    asks: str
    command: tuple[str, ...]
    limit: float
    least: float = 5.0
    title: str = ""
    after: tuple[str, ...] = ()
    times: bool = False
    under: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()


TO_CUDA = ("--device", "cuda", "--no-progress")
GUARD = "kernels"
"""The step without which no time means anything."""


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
    large = (str(sizes.pair), str(scratch / "pair"), "--processes", processes)
    return [
        Step("CPU kernels", "compiled, a process a core", check("compile"), 150, title="Preparations"),
        Step("tiny pair", "written", (make, *tiny, "--tensor-bytes", str(sizes.tiny_bytes)), 120),
        Step("mixed pair", "written", (make, *mixed), 60),
        Step("large pair", "written", (make, *large), 150),
    ]


def first_steps(sizes: Sizes) -> list[Step]:
    """What both calls begin with."""
    return [
        Step("machine", "which GPU, driver and packages", check("machine"), 30, title="Machine"),
        Step(
            GUARD,
            "do all five kernels count what NumPy counts, on every code of f16, e4m3, e5m2 and bf16",
            check("kernels", "--coordinates", sizes.coordinates),
            45,
            title="Kernels beside the reference",
        ),
    ]


def call_a(sizes: Sizes, scratch: Path) -> list[Step]:
    """Is it right, and how fast."""
    fixtures = sorted(base.parent for base in (ROOT / "fixtures").glob("*/base"))
    runs, compiled = "Whole runs, both devices", ("CPU kernels",)
    one_rule, most = ("--scratch", scratch, "--rules", "abs:1e-05"), sizes.threads[-1]
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
            check("runs", *fixtures, "--scratch", scratch, "--rules", *sizes.rules),
            45,
            title=runs,
            after=compiled,
        ),
        Step(
            "small tensors",
            f"are {sizes.tiny} small tensors, many to a launch, measured alike, and how fast",
            check("runs", scratch / "tiny", *one_rule, "--rounds", sizes.tiny_rounds),
            40,
            title=runs,
            after=("tiny pair", *compiled),
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
    ways = ("io=mmap,threads=8", "gpu_memory=64M", "mask=rel:0.001", "mask=eta:0.001", "compare=stored,mask=top:5")
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
            check("runs", scratch / "mixed", *one_rule, "--ways", *ways),
            45,
            title="Whole runs, both devices",
            after=("mixed pair", *compiled),
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


def sides(pair: Path) -> tuple[str, str]:
    """Both sides of a pair."""
    return str(pair / "base"), str(pair / "tuned")


def whole(sizes: Sizes, scratch: Path, device: str, threads: int, masks: bool = False, memory: str = "8G") -> Step:
    """Runs over the large pair."""
    given = ["--device", device, "--threads", threads, "--rounds", 1 if threads == 1 else 2]
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
    folders = tuple((name, str(scratch / "kept")) for name in ("CKPTDIFF_CACHE_DIR", "CUPY_CACHE_DIR"))
    for which in ("first", "later"):
        yield Step(
            f"{which} start",
            "what do context, compiler, pinned memory and the first scan take",
            speed("start"),
            45,
            title=f"The {which} process",
            times=True,
            env=folders,
        )


CALLS = {"a": call_a, "b": call_b}


def file_of(scratch: Path, name: str, kind: str) -> Path:
    """Where a step keeps its figures, or what it prints."""
    return scratch / f"{''.join(letter if letter.isalnum() else '-' for letter in name)}.{kind}"


class Running:
    """A step under way, in a process group of its own."""

    def __init__(self, step: Step, python: Sequence[str], scratch: Path) -> None:
        self.step, self.begun = step, time.monotonic()
        self.figures, self.log = (file_of(scratch, step.name, kind) for kind in ("json", "log"))
        command = [part.replace("{figures}", str(self.figures)) for part in step.command]
        # Tests that run this inside a test must not meet the outer one's settings.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        paths = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
        ours = {"PYTHONPATH": paths, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", "CKPTDIFF_NEED_GPU": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*step.under, *python, *command],
                cwd=ROOT,
                env={**kept, **ours, **dict(step.env)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.ended = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        self.process.wait()
        self.ended = time.monotonic()

    def wait(self, limit: float) -> Record:
        """What it came to; killed if it takes longer than `limit` seconds."""
        try:
            code: int | None = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            self.kill()
        self._end_group()
        output = self.log.read_text(errors="replace")
        figures = json.loads(self.figures.read_text()) if self.figures.exists() else {}
        passed = code == 0
        why = "" if passed else f"killed after {limit:.0f} s" if code is None else f"ended with {code}"
        return {
            "status": "passed" if passed else "failed",
            "why": why,
            "seconds": round((self.ended or time.monotonic()) - self.begun, 2),
            "figures": figures,
            "output": output[-TAIL:],
        }

    def kill(self) -> None:
        """End it and all that it started; Python says first where it was."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGABRT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
        self._end_group()

    def _end_group(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            print(f"{self.step.name}: process {self.process.pid} cannot be killed", flush=True)


class Call:
    """One call under way, and what it found.

    Parameters
    ----------
    steps, prepared : list of Step
    python : sequence of str
        The interpreter, with what is put before every program.
    out, scratch : Path
        Where figures go, and where everything else does.
    facts : dict
        What the figures begin with; "name" and "budget" (seconds) are used.
    patience : float
        How many times the limits of the steps are waited for.
    rehearsal : bool
        Whether there is no GPU for programs that watch one.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        prepared: Sequence[Step],
        python: Sequence[str],
        out: Path,
        scratch: Path,
        facts: Record,
        patience: float = 1.0,
        rehearsal: bool = False,
    ) -> None:
        self.steps, self.prepared, self.python, self.out, self.scratch = steps, prepared, python, out, scratch
        self.patience, self.rehearsal, self.begun = patience, rehearsal, time.monotonic()
        self.path = out / f"call-{facts['name']}.json"
        self.log = self.path.with_suffix(".log")
        waiting: Record = {"status": "waiting", "why": "", "seconds": 0.0, "figures": {}, "output": ""}
        self.found = {
            step.name: {"asks": step.asks, "command": " ".join((*step.under, "python", *step.command)), **waiting}
            for step in (*prepared, *steps)
        }
        self.facts = facts
        self.background: dict[str, Running] = {}
        self.log.write_text("")

    def run(self) -> bool:
        """Take all steps; returns whether all passed."""
        current: Running | None = None
        try:
            for one in self.prepared:
                self.background[one.name] = Running(one, self.python, self.scratch)
            for step in self.steps:
                why = self._why_not(step)
                if why:
                    self._note(step, {"status": "absent" if why.startswith("absent") else "skipped", "why": why})
                    continue
                self._write()
                current = self._start(step)
                self._note(step, current.wait(min(step.limit * self.patience, self._left())))
                current = None
            for name in list(self.background):
                self._await(name)
        finally:
            for running in filter(None, (*self.background.values(), current)):
                running.kill()
                self._note(running.step, {"status": "failed", "why": "the call was ended"})
            for found in self.found.values():
                if found["status"] == "waiting":
                    found |= {"status": "skipped", "why": "skipped: the call was ended"}
            self._write(ended=True)
            report = tables(self.document())
            self.path.with_suffix(".md").write_text(report)
            print(report, flush=True)
        return self.passed

    @property
    def passed(self) -> bool:
        """Whether every step did, but for those whose program is not installed."""
        return all(map(done, self.found.values()))

    def document(self) -> Record:
        """All that is known so far."""
        steps = [{"name": name, **found} for name, found in self.found.items()]
        rows = self.found.get("machine", {"figures": {}})["figures"].get("rows", ())
        known = {row["what"]: row["found"] for row in rows}
        device = {"device": known.get("GPU", "unknown"), "driver": known.get("driver", "unknown")}
        return {**self.facts, **device, "passed": self.passed, "steps": steps}

    def _left(self) -> float:
        return self.facts["budget"] - RESERVE - (time.monotonic() - self.begun)

    def _why_not(self, step: Step) -> str:
        """Why a step cannot be taken; waits for what it needs."""
        if self._left() < step.least:
            return "skipped: no time left"
        if step.times and self.found.get(GUARD, {}).get("status") == "failed":
            return "skipped: the kernels do not count right, so their speed means nothing"
        if step.under and not self.rehearsal and shutil.which(step.under[0], path=search_path()) is None:
            return f"absent: {step.under[0]} is not on PATH"
        for name in step.after:
            self._await(name)
            if self.found[name]["status"] != "passed" and name != "CPU kernels":  # else a run compiles its own
                return f"skipped: {name} failed"
        return "skipped: no time left" if self._left() < step.least else ""

    def _start(self, step: Step) -> Running:
        if step.under and self.rehearsal:
            step = replace(step, under=())
        elif step.under:
            program = shutil.which(step.under[0], path=search_path())
            step = replace(step, under=(str(program), *step.under[1:]))
        return Running(step, self.python, self.scratch)

    def _await(self, name: str) -> None:
        running = self.background.pop(name, None)
        if running is not None:
            spent = time.monotonic() - running.begun
            limit = min(running.step.limit * self.patience - spent, self._left())
            self._note(running.step, running.wait(max(limit, 0.1)))

    def _note(self, step: Step, found: Record) -> None:
        """Keep what a step came to."""
        if step.under and self.rehearsal and found["status"] == "passed":
            found["why"] = f"without {step.under[0]}: a rehearsal has no GPU for it to watch"
        self.found[step.name] |= {"title": step.title, "at": round(time.monotonic() - self.begun, 1), **found}
        with self.log.open("a") as log:
            log.write(f"==== {step.name}: {found['status']} {found['why']}\n")
            printed = file_of(self.scratch, step.name, "log")
            if printed.exists():
                log.write(printed.read_text(errors="replace") + "\n")
        self._write()
        print(f"{self.found[step.name]['seconds']:8.1f} s  {found['status']:8} {step.name}  {found['why']}", flush=True)

    def _write(self, ended: bool = False) -> None:
        self.facts |= {"seconds": round(time.monotonic() - self.begun, 1), "ended": ended}
        write_json(self.path, self.document())


def search_path() -> str:
    """PATH, and where CUDA's programs usually are."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])


def tables(document: Record) -> str:
    """The figures as Markdown."""
    kind = "Rehearsal without a GPU, figures mean nothing: call" if document["rehearsal"] else "Call"
    lines = [f"## {kind} {document['name']}: {document['device']}, {document['begun'][:10]}\n"]
    lines.append(
        f"Commit {document['commit']} (sources {document['sources']}), driver {document['driver']}, "
        f"{document['machine']['processor']}, {document['machine']['cores']} cores; {document['seconds']:.0f} s of "
        f"{document['budget']:.0f}. {'All passed.' if document['passed'] else 'NOT ALL PASSED.'}\n"
    )
    shown = ("name", "asks", "status", "why", "seconds")
    lines.append(markdown([{key: step[key] for key in shown} for step in document["steps"]]))
    titles = list(dict.fromkeys(step.get("title") for step in document["steps"] if step.get("title")))
    for title in titles:
        same = (step for step in document["steps"] if step.get("title") == title)
        rows = [row for step in same for row in step["figures"].get("rows", ())]
        if rows:
            lines.append(f"### {title}\n")
            lines.append(markdown([{key: value for key, value in row.items() if key != "wrong"} for row in rows]))
    for step in document["steps"]:
        if step["status"] == "failed" or step["name"] in ("doctor", "profile"):
            lines.append(f"### {step['name']}: {step['status']} {step['why']}\n")
            lines.append(f"```\n{step['output'].strip(chr(10))}\n```\n")
    return "\n".join(lines)


def commit() -> str:
    """The commit of the tree, if it is a clone."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def sources() -> str:
    """A hash of all that is measured, which tells trees apart where there is no git."""
    digest = hashlib.sha256()
    for folder in ("ckptdiff", "cuda", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh"):
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@contextmanager
def scratch_folder(sizes: Sizes, memory: Path = Path("/dev/shm")) -> Iterator[tuple[Path, Sizes]]:
    """A folder for all that is written, and sizes that fit there: in memory if there is room, else on a disk."""
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 3 * sizes.pair
    if not roomy:  # a large pair would be as slow to write as the disk is
        sizes = replace(sizes, pair=min(sizes.pair, 4 << 30))
    with tempfile.TemporaryDirectory(prefix="ckptdiff-", dir=memory if roomy else None) as name:
        while 3 * sizes.pair > shutil.disk_usage(name).free and sizes.pair > 1 << 20:
            sizes = replace(sizes, pair=sizes.pair // 2)
        yield Path(name), sizes


def make(name: str, options: argparse.Namespace) -> bool:
    """One call; returns whether all passed."""
    begun = datetime.now(UTC).isoformat(timespec="seconds")
    with scratch_folder(SMALL if options.rehearse else REAL[name]) as (scratch, sizes):
        steps = chosen_steps(name, sizes, scratch, options)
        needed = {one for step in steps for one in step.after}
        prepared = [step for step in preparations(sizes, scratch) if step.name in needed]
        python = [sys.executable]
        if options.rehearse:
            python += [str(BENCH / "host_device.py"), str(options.kernels or scratch / "host")]
        facts = {
            "name": name,
            "rehearsal": options.rehearse,
            "commit": options.commit or commit(),
            "sources": sources(),
            "begun": begun,
            "budget": options.budget or (3600.0 if options.rehearse else BUDGET[name]),
            "machine": machine(),
            "pair_bytes": 2 * sizes.pair,
            "scratch": str(scratch),
        }
        patience = 20.0 if options.rehearse else 1.0
        return Call(steps, prepared, python, options.out, scratch, facts, patience, options.rehearse).run()


def chosen_steps(name: str, sizes: Sizes, scratch: Path, options: argparse.Namespace) -> list[Step]:
    """The steps of a call; those that did not pass in an earlier one come right after the first two."""
    steps = CALLS[name](sizes, scratch)
    if options.repeat:
        before = {step["name"] for step in json.loads(options.repeat.read_text())["steps"] if not done(step)}
        again = [step for call in CALLS.values() for step in call(sizes, scratch) if step.name in before]
        steps = list({step.name: step for step in (*steps[:2], *again, *steps[2:])}.values())
    if options.only:
        steps = [step for step in steps if any(word in step.name for word in options.only.split(","))]
    return steps


def done(found: Record) -> bool:
    """Whether a step passed, or its program is not installed."""
    return found["status"] in ("passed", "absent")


def main() -> int:
    """Command line entry; returns 1 if a step did not pass."""
    parser = argparse.ArgumentParser(
        description="Answer all that a first run on a GPU has to, in two calls of minutes."
    )
    parser.add_argument("--call", choices=CALLS, help="which one; a rehearsal makes both by default")
    parser.add_argument("--out", type=Path, required=True, help="folder for figures, tables and the log")
    parser.add_argument("--rehearse", action="store_true", help="small, on the host device of the tests, without a GPU")
    parser.add_argument("--kernels", type=Path, help="keep what a rehearsal builds here, for the next one")
    parser.add_argument("--budget", type=float, help="seconds of the whole call (a: 240, b: 360)")
    parser.add_argument("--repeat", type=Path, metavar="JSON", help="first repeat what did not pass in an earlier call")
    parser.add_argument("--only", metavar="WORDS", help="only steps whose name holds one of these, by commas")
    parser.add_argument("--commit", help="of a tree that is not a clone")
    options = parser.parse_args()
    if not (options.call or options.rehearse):
        parser.error("--call a or --call b, or --rehearse")
    options.out.mkdir(parents=True, exist_ok=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # steps over their limit are aborted
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    passed = [make(name, options) for name in ([options.call] if options.call else CALLS)]
    print("all passed" if all(passed) else "NOT ALL PASSED", flush=True)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
