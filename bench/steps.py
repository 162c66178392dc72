"""Take steps one after the other, each a process with a time limit, and keep what they find as they go.

What is found is a JSON file that is whole at any moment, and tables in Markdown. `on_gpu.py` says what the steps are.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measure import markdown, write_json

ROOT = Path(__file__).absolute().parents[1]
RESERVE = 8.0
"""Seconds kept for the tables and for removing the pairs."""
TAIL = 4000
"""Characters of output kept in the figures, the last ones."""
GUARD = "kernels"
"""The step without which no time means anything."""
Record = dict[str, Any]


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


def file_of(scratch: Path, name: str, kind: str) -> Path:
    """Where a step keeps its figures, or what it prints."""
    return scratch / f"{''.join(letter if letter.isalnum() else '-' for letter in name)}.{kind}"


@contextmanager
def unbroken() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until this is over, so that no process is started of which nobody knows."""
    came: list[int] = []
    before = {one: signal.signal(one, lambda signum, _: came.append(signum)) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    if came:
        signal.raise_signal(came[0])


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
                with unbroken():
                    self.background[one.name] = Running(one, self.python, self.scratch)
            for step in self.steps:
                why = self._why_not(step)
                if why:
                    self._note(step, {"status": "absent" if why.startswith("absent") else "skipped", "why": why})
                    continue
                self._write()
                with unbroken():
                    current = self._start(step)
                self._note(step, current.wait(min(step.limit * self.patience, self._left())))
                current = None
            for name in list(self.background):
                self._await(name)
        finally:
            for running in filter(None, (*self.background.values(), current)):
                running.kill()
                if self.found[running.step.name]["status"] == "waiting":
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
        running = self.background.get(name)
        if running is not None:
            spent = time.monotonic() - running.begun
            limit = min(running.step.limit * self.patience - spent, self._left())
            self._note(running.step, running.wait(max(limit, 0.1)))
            del self.background[name]

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


def done(found: Record) -> bool:
    """Whether a step passed, or its program is not installed."""
    return found["status"] in ("passed", "absent")
