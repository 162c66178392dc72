"""A command that is killed outright leaves what it had written; the same command, run again, leaves only its output."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from stopped_process import ended, go_on, stopped_at

from ckptdiff import cli

PAIR = tuple(str(Path(__file__).parents[1] / "fixtures" / "tied" / side) for side in ("base", "tuned"))

NAMING = "ckptdiff.files.hidden:Hidden.take_name"
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


@pytest.mark.parametrize("command", COMMANDS)
def test_the_next_run_removes_what_a_killed_one_left(
    command: str, arguments: Callable[[str], list[str]], tmp_path: Path
) -> None:
    words = arguments(command)
    before = set(tmp_path.iterdir())
    process = stopped_at(NAMING, 1, *words)
    process.kill()
    assert ended(process)[0] == -signal.SIGKILL
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
    process = stopped_at(NAMING, 1, *words)
    (living,) = tmp_path.iterdir()
    assert cli.main(words) == 0
    (output,) = set(tmp_path.iterdir()) - {living}
    output.unlink()
    go_on(process)
    assert ended(process)[0] == 0
    assert list(tmp_path.iterdir()) == [output]
