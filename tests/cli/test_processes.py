"""Pipes, signals and full disks, each with a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
from patience import PATIENCE

Spawn = Callable[..., "subprocess.Popen[bytes]"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    _, err = process.communicate(timeout=PATIENCE)
    return process.returncode, err.decode()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("form", ["table", "json", "ndjson", "csv"])
def test_a_closed_pipe_ends_quietly(spawn: Spawn, form: str, unbuffered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    process = spawn("diff", "a", "b", "--format", form, "--by", "tensor", "--no-progress", layers=60)
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    assert ended(process) == (141, "")


@pytest.mark.parametrize("form", ["table", "ndjson"])
def test_a_run_file_is_finished_though_nobody_reads(spawn: Spawn, form: str, tmp_path: Path) -> None:
    run = tmp_path / "run.h5"
    process = spawn("diff", "a", "b", "--format", form, "--by", "tensor", "-o", run, "--no-progress", layers=60)
    assert process.stdout is not None
    process.stdout.close()
    assert ended(process) == (0, "")
    with h5py.File(run) as file:
        assert file.attrs["complete"] == 1
    assert names(tmp_path) == ["run.h5"]


def test_help_into_a_closed_pipe(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "ckptdiff.cli", "--help"], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_trouble() -> None:
    for arguments in (["--help"], ["diff", "--help"]):
        with Path("/dev/full").open("wb") as full:
            done = subprocess.run(
                [sys.executable, "-m", "ckptdiff.cli", *arguments], stdout=full, stderr=subprocess.PIPE, check=False
            )
        assert done.returncode == 2
        assert done.stderr == b"ckptdiff: error: No space left on device\n"


def test_no_stdout_at_all(spawn: Spawn) -> None:
    code = "import os, subprocess, sys; os.close(1); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = [sys.executable, "-c", code, "-m", "ckptdiff.cli", "diff", "a", "b"]
    done = subprocess.run(command, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2 and b"standard output is closed" in done.stderr


@pytest.mark.parametrize(
    ("signum", "code", "message"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "terminated")],
)
def test_signals_leave_nothing_behind(spawn: Spawn, signum: int, code: int, message: str, tmp_path: Path) -> None:
    run, report = tmp_path / "run.h5", tmp_path / "report.ndjson"
    process = spawn("diff", "a", "b", "-o", run, "--format", "ndjson", "-O", report, pause=600.0)
    while len(names(tmp_path)) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    assert all(name.startswith(".") for name in names(tmp_path))
    process.send_signal(signum)
    returned, told = ended(process)
    assert returned == code and told.endswith(f"ckptdiff: {message}\n") and "Traceback" not in told
    assert names(tmp_path) == []


def test_an_ignored_hangup_stays_ignored(tmp_path: Path) -> None:
    code = (
        "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\nfrom ckptdiff.cli import signals\n"
        "with signals.signals_noted():\n    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN\n"
        "    assert signal.getsignal(signal.SIGTERM) is signals._note\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ndjson_lines_arrive_while_the_run_goes_on(spawn: Spawn) -> None:
    process = spawn("diff", "a", "b", "--format", "ndjson", layers=60, pause=0.1, pipesize=4096)  # not room for all
    assert process.stdout is not None
    assert b'"type": "header"' in process.stdout.readline()
    assert b'"type": "tensor"' in process.stdout.readline()
    assert process.poll() is None
    process.terminate()
    assert ended(process)[0] == 143


def test_odd_locales_do_not_end_a_report(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"Gewicht-\u00e4\u4e2d": np.zeros(3, np.float32)}, tmp_path / "m.safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "ckptdiff.cli", "inspect", str(tmp_path / "m.safetensors")],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0 and b"Gewicht-\\xe4\\u4e2d" in done.stdout
