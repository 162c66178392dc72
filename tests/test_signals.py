"""A signal ends the program at any step of the code that runs threads: no lock stays closed, nothing waits for ever."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ckptdiff import cli

FIXTURES = Path(__file__).parents[1] / "fixtures"

# Python runs the handler of a signal between two of its own steps. One run after the other is sent a signal at a later
# one of them, until a run has fewer.
AT_EACH_STEP = """
import os, signal, sys, threading, time

from ckptdiff.cli import main

MODULES = (
    "threading", "concurrent.futures", "ckptdiff.schedule", "ckptdiff.runfile.histogram_table",
    "ckptdiff.track.follow", "ckptdiff.spectra.in_order", "ckptdiff.spectra.stage",
)


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
        return main(sys.argv[2:])
    finally:
        sys.setprofile(None)


every = int(sys.argv[1])
assert run(0) == 0
sent = 0
while (code := run(1 + sent * every)) != 0:
    sent += 1
    assert code == 143, code
    deadline = time.monotonic() + 30
    while threading.active_count() > 1:
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.001)
print(sent)
"""

COMMANDS = {
    "diff": (1, "diff"),
    "track": (1, "track"),
    "spectra": (9, "diff", "--spectra", "randomized"),  # with twenty times the steps
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_at_each_step(command: str, tmp_path: Path) -> None:
    every, *words = COMMANDS[command]
    out = tmp_path / "out.h5"
    pair = [FIXTURES / "tied/base", FIXTURES / "tied/tuned"]
    arguments = [*words, *pair, "-o", out, "--threads", "2", "-O", "/dev/null"]
    result = subprocess.run(
        [sys.executable, "-c", AT_EACH_STEP, str(every), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 30
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_after_the_last_step(
    signum: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "abandon_stdout", lambda: signal.raise_signal(signum))
    assert cli.main(["--version"]) == code
    assert capsys.readouterr().err == ""
