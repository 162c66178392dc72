"""The program in a process of its own that stops, as by SIGSTOP, at a chosen call: what comes next is not a race."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from patience import PATIENCE

_STOPPING = """
import importlib, os, signal, sys, time
from ckptdiff.cli import main

module, path = sys.argv[1].split(":")
*outer, name = path.split(".")
owner, left = importlib.import_module(module), int(sys.argv[2])
for part in outer:
    owner = getattr(owner, part)
function = getattr(owner, name)

def stopping(*arguments, **options):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.05)  # a signal that came meanwhile may have been taken by a thread that has yet to note it
    return function(*arguments, **options)

setattr(owner, name, stopping)
sys.argv[1:] = sys.argv[3:]
sys.exit(main())
"""


def stopped_at(function: str, call: int, *arguments: str | Path) -> subprocess.Popen[bytes]:
    """``ckptdiff`` with these arguments, when it is about to call ``module:name`` for the so-manieth time.

    `go_on` or a SIGKILL ends the stop; another signal arrives when it goes on.
    """
    command = [sys.executable, "-c", _STOPPING, function, str(call), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        _, err = process.communicate()
        raise AssertionError(f"ended with {status} before it came to {function}: {err.decode()}")
    return process


def go_on(process: subprocess.Popen[bytes]) -> None:
    """Let it take the signals that came meanwhile, and go on."""
    process.send_signal(signal.SIGCONT)


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """The exit code, and what it said on stderr."""
    _, err = process.communicate(timeout=PATIENCE)
    return process.returncode, err.decode()
