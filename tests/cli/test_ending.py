"""How a command ends: at once, but with everything said, registered and coded as Python would have it."""

from __future__ import annotations

import pstats
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE

import ckptdiff

WATCHED = """
import atexit, os, sys
from ckptdiff.cli import program
class Last:
    def __del__(self, write=os.write):
        write(1, b"taken apart\\n")
last = Last()
atexit.register(print, "registered")
sys.argv = ["ckptdiff", *sys.argv[1:]]
{before}
program()
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_what_is_registered_happens_and_nothing_is_taken_apart() -> None:
    done = python("-c", WATCHED.format(before=""), "--version")
    assert (done.returncode, done.stdout.splitlines()[1:], done.stderr) == (0, ["registered"], "")
    assert ckptdiff.__version__ in done.stdout


@pytest.mark.parametrize("before", ["sys.settrace(lambda *event: None)", "sys.setprofile(lambda *event: None)"])
def test_debuggers_and_profilers_get_the_usual_end(before: str) -> None:
    done = python("-c", WATCHED.format(before=before), "--version")
    assert (done.returncode, done.stdout.splitlines()[1:]) == (0, ["registered", "taken apart"])


def test_a_profile_of_a_command_is_written(tmp_path: Path) -> None:
    done = python("-m", "cProfile", "-o", str(tmp_path / "profile"), "-m", "ckptdiff", "--version")
    assert done.returncode == 0 and pstats.Stats(str(tmp_path / "profile")).total_calls > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", ["ckptdiff", "ckptdiff.cli"])
def test_exit_codes_and_messages(module: str) -> None:
    refused = python("-m", module, "show", "nowhere.h5")
    assert refused.returncode == 2 and refused.stdout == "" and "nowhere.h5" in refused.stderr
    assert python("-m", module, "--help").stdout.startswith("Usage")


def test_what_waits_in_a_buffer_is_written() -> None:
    """More than a pipe holds."""
    command = "from ckptdiff.cli import program; print('line\\n' * 50_000, end=''); program()"
    done = python("-c", command, "--version")
    assert done.stdout.startswith("line\n" * 50_000) and ckptdiff.__version__ in done.stdout
