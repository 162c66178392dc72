"""A command that is killed outright leaves what it had written; the same command, run again, leaves only its output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptdiff import cli

PAIR = tuple(str(Path(__file__).parents[1] / "fixtures" / "tied" / side) for side in ("base", "tuned"))

# The program, but for a stop before the first output takes its name.
HELD = """
import sys
from ckptdiff import cli
from ckptdiff.runfile.hidden import Hidden

def wait(hidden, take_name=Hidden.take_name):
    Hidden.take_name = take_name
    print("written", flush=True)
    sys.stdin.readline()
    take_name(hidden)

Hidden.take_name = wait
sys.exit(cli.main(sys.argv[1:]))
"""
COMMANDS = {
    "diff": "diff {base} {tuned} -o {out}.h5 --mask bitwise -O /dev/null",
    "report": "diff {base} {tuned} --format json -O {out}.json",
    "export": "mask export {made}/run.h5 -o {out}.npz",
    "combine": "mask combine --union {made}/run.h5 {made}/run.h5 -o {out}.h5",
    "patch": "mask export {made}/run.h5 --layout patch -o {out}.safetensors",
    "shira": "mask export {made}/run.h5 --layout shira --rank 2 -o {out}",
    "apply": "patch apply {base} {made}/patch.safetensors -o {out}",
    "track": "track {base} {tuned} -o {out}.h5 -O /dev/null",
    "lora": "lora {base} {tuned} --rank 2 -o {out}",
    "spectra": "spectra add {out}.h5",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file and a patch."""
    folder = tmp_path_factory.mktemp("made")
    run, patch = folder / "run.h5", folder / "patch.safetensors"
    assert cli.main(["diff", *PAIR, "-o", str(run), "--mask", "bitwise", "-O", os.devnull]) == 0
    assert cli.main(["mask", "export", str(run), "--layout", "patch", "-o", str(patch)]) == 0
    return folder


@pytest.fixture
def arguments(made: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    def words(command: str) -> list[str]:
        names = {"base": PAIR[0], "tuned": PAIR[1], "made": made, "out": tmp_path / "out"}
        if command == "spectra":
            (tmp_path / "out.h5").write_bytes((made / "run.h5").read_bytes())
        return [word.format(**names) for word in COMMANDS[command].split()]

    return words


@contextmanager
def held(arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process of its own, which has written an output and waits."""
    command = [sys.executable, "-c", HELD, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n", process.communicate()
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_next_run_removes_what_a_killed_one_left(
    command: str, arguments: Callable[[str], list[str]], tmp_path: Path
) -> None:
    words = arguments(command)
    before = set(tmp_path.iterdir())
    with held(words) as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    (left,) = set(tmp_path.iterdir()) - before
    assert left.name.startswith(".out") and left.suffix == ".tmp"
    assert cli.main(words) == 0
    (output,) = tmp_path.iterdir()
    assert output.stem == "out" and not (
        output.is_dir() and [path for path in output.iterdir() if path.suffix == ".tmp"]
    )


@pytest.mark.parametrize("command", ["diff", "report"])
def test_two_runs_to_one_target_leave_each_other_alone(
    command: str, arguments: Callable[[str], list[str]], tmp_path: Path
) -> None:
    words = arguments(command)
    with held(words) as process:
        (living,) = tmp_path.iterdir()
        assert cli.main(words) == 0
        (output,) = set(tmp_path.iterdir()) - {living}
        output.unlink()
        _, errors = process.communicate(b"\n")
    assert process.returncode == 0, errors
    assert list(tmp_path.iterdir()) == [output]
