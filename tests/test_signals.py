"""A signal ends the program at any step of the code around threads and processes, and where there are no steps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from patience import PATIENCE

from ckptdiff import cli
from ckptdiff.cli.signals import signals_noted
from ckptdiff.events import Event, StageProgress
from ckptdiff.run.engine import run
from ckptdiff.run.worker import Worker

FIXTURES = Path(__file__).parents[1] / "fixtures"

# Python runs the handler of a signal between two of its own steps. Each run is sent a signal at a later one of them.
# Steps vary with the threads: some runs have fewer, and end by themselves.
AT_EACH_STEP = """
import os, signal, subprocess, sys, threading, time

from ckptdiff import cli
from ckptdiff.run import warm_up

MODULES = (
    "threading", "concurrent.futures", "subprocess", "ckptdiff.run.warm_up", "ckptdiff.run.schedule",
    "ckptdiff.runfile.histogram_table", "ckptdiff.track.follow", "ckptdiff.in_order", "ckptdiff.spectra.stage",
)


def compile_apart(arguments, session):
    warm_up._start = lambda use: subprocess.Popen(["sleep", "0.05"], stdin=subprocess.PIPE)
    warm_up.compile_apart([("alone", "bf16")] * 3)
    return 0


if sys.argv[2:] == ["compile"]:
    cli._run = compile_apart


def run(last):
    steps = 0

    def step(frame, event, argument):
        nonlocal steps
        if event in ("call", "c_return") and frame.f_globals.get("__name__", "").startswith(MODULES):
            steps += 1
            if steps == last:
                sys.setprofile(None)
                os.kill(os.getpid(), signal.SIGTERM)

    sys.setprofile(step)
    try:
        return cli.main(sys.argv[2:]), steps
    finally:
        sys.setprofile(None)


code, steps = run(0)
assert code == 0
codes = []
for last in range(1, steps, int(sys.argv[1])):
    codes.append(run(last)[0])
    while threading.active_count() > 1:  # one that never ends is noticed by the process that started this one
        time.sleep(0.001)
print(*codes)
"""

COMMANDS = {
    "diff": (2, "diff"),
    "track": (1, "track"),
    "spectra": (9, "diff", "--spectra", "randomized"),  # with twenty times the steps
}


def assert_ends(every: int, *arguments: str | Path) -> None:
    """A signal at each step, or at some of them, ends the command."""
    command = [sys.executable, "-c", AT_EACH_STEP, str(every), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    codes = result.stdout.split()
    assert set(codes) <= {"0", "143"} and codes.count("143") > max(30, len(codes) // 2), codes


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_at_each_step_of_a_command(command: str, tmp_path: Path) -> None:
    every, *words = COMMANDS[command]
    out = tmp_path / "out.h5"
    pair = FIXTURES / "tied/base", FIXTURES / "tied/tuned"
    assert_ends(every, *words, *pair, "-o", out, "--threads", "2", "-O", os.devnull)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_a_signal_at_each_step_while_other_processes_compile() -> None:
    assert_ends(1, "compile")


# Within one call that never returns Python runs no handler.
STUCK = """
import ctypes, sys
from pathlib import Path

from ckptdiff.cli.signals import ended_soon, signals_noted
from ckptdiff.files.staged import StagedFile
from ckptdiff.files.staged import StagedFolder

mutex, lock = ctypes.create_string_buffer(256), ctypes.CDLL(None).pthread_mutex_lock
with (
    signals_noted(),
    ended_soon(float(sys.argv[1])),
    StagedFile(Path("file")) as file,
    StagedFolder(Path("folder")) as folder,
    StagedFile(folder.path / "inside") as inside,
):
    print("ready", flush=True)
    lock(mutex)
    lock(mutex)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a mutex of zeros is an open one on Linux")
@pytest.mark.parametrize("grace", [0.0, 0.5, PATIENCE])
def test_a_signal_while_one_call_lasts_for_ever(grace: float, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STUCK, str(grace)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    assert len(list(tmp_path.iterdir())) == 2
    process.send_signal(signal.SIGINT)
    if grace == PATIENCE:  # then it is a second signal that ends it
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    ends = {130: b"ckptdiff: interrupted\n"}
    if grace == PATIENCE:  # of two at the same time any may be the first
        ends[143] = b"ckptdiff: terminated\n"
    assert ends.get(process.returncode) == err
    assert list(tmp_path.iterdir()) == []


def test_a_task_that_lasts_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress goes on meanwhile, and a signal is raised."""
    told = threading.Event()

    def lasts(worker: Worker, *given: object) -> None:
        assert told.wait(PATIENCE)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        assert worker._stop.wait(PATIENCE)

    def listen(event: Event) -> None:
        if isinstance(event, StageProgress) and event.stage == "comparing":
            told.set()

    for way in ("measure", "pass_over"):
        monkeypatch.setattr(Worker, way, lasts)
    with signals_noted(), pytest.raises(KeyboardInterrupt) as raised:
        run(str(FIXTURES / "tied/base"), str(FIXTURES / "tied/tuned"), listener=listen)
    assert raised.value.args == (signal.SIGTERM,)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_after_the_last_step(
    signum: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "abandon_stdout", lambda: signal.raise_signal(signum))
    assert cli.main(["--version"]) == code
    assert capsys.readouterr().err == ""
