"""Runs that are stopped or fail half-way: the target is as it was, nothing is left, and the exit code says why."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from patience import PATIENCE
from stopped_process import ended, go_on, stopped_at

from ckptdiff.cli import main
from ckptdiff.cli.signals import signals_noted
from ckptdiff.errors import ChangedFileError
from ckptdiff.events import Event, Finished, StageProgress, Started
from ckptdiff.interrupts import raise_pending
from ckptdiff.options import Options
from ckptdiff.run.engine import run
from ckptdiff.runfile.writer import RunFileWriter

FIXTURES = Path(__file__).parents[1] / "fixtures"
Pair = tuple[Path, Path]


def write(path: Path, tuned: bool, tensors: int, rows: int) -> Path:
    """A bf16 checkpoint of `tensors` equal tensors of `rows` times a million coordinates, of which a tenth is tuned."""
    rng = np.random.default_rng(1)
    part = (rng.normal(0, 0.02, 10**6).astype(np.float32).view(np.uint32) >> 16).astype("<u2")
    if tuned:
        part += rng.random(part.size) < 0.1
    nbytes = rows * part.nbytes
    header = {
        f"layers.{i}.up_proj.weight": {
            "dtype": "BF16",
            "shape": [rows, part.size],
            "data_offsets": [i * nbytes, (i + 1) * nbytes],
        }
        for i in range(tensors)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(rows * tensors):
            file.write(part.data)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """200 MB a side, most coordinates changed."""
    folder = tmp_path_factory.mktemp("large")
    yield write(folder / "base.safetensors", False, 10, 10), write(folder / "tuned.safetensors", True, 10, 10)
    shutil.rmtree(folder)


@pytest.fixture
def small(tmp_path: Path) -> Pair:
    folder = tmp_path / "pair"
    folder.mkdir()
    return write(folder / "base.safetensors", False, 3, 2), write(folder / "tuned.safetensors", True, 3, 2)


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An older run file."""
    path = tmp_path_factory.mktemp("older") / "run.h5"
    run(str(FIXTURES / "tied/base"), str(FIXTURES / "tied/tuned"), out=path)
    return path.read_bytes()


@pytest.fixture(params=["absent", "older"])
def out(request: pytest.FixtureRequest, tmp_path: Path, older: bytes) -> Path:
    """Where the run file is to go: a place where there is none, or an older one."""
    folder = tmp_path / "out"
    folder.mkdir()
    if request.param == "older":
        (folder / "run.h5").write_bytes(older)
    return folder / "run.h5"


def state(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.parent.iterdir()}


def start(function: str, call: int, *arguments: str | Path) -> subprocess.Popen[bytes]:
    """A run that waits at a call."""
    return stopped_at(function, call, "diff", *arguments, "-O", os.devnull, "--no-progress")


WRITING = "ckptdiff.runfile.writer:RunFileWriter.add_mask_chunks"
STOPPED = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}


@pytest.mark.parametrize(
    ("signum", "out"),
    [(signum, "absent") for signum in STOPPED] + [(signal.SIGTERM, "older")],
    indirect=["out"],
)
def test_a_stopped_run_leaves_the_target_as_it_was(large: Pair, out: Path, signum: int) -> None:
    before = state(out)
    process = start(WRITING, 6, *large, "-o", out, "--mask", "bitwise")
    (staged,) = set(out.parent.iterdir()) - {out}
    assert staged.stat().st_size > 1 << 20
    process.send_signal(signum)
    go_on(process)
    code, err = ended(process)
    assert code == STOPPED[signum], err
    if signum == signal.SIGKILL:
        staged.unlink()
    else:
        assert err == f"ckptdiff: {'interrupted' if signum == signal.SIGINT else 'terminated'}\n"
    assert state(out) == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_impatient_user(large: Pair, tmp_path: Path, signum: int) -> None:
    """Signals that follow the first end the process, and what it has not removed by then goes too."""
    process = start(WRITING, 1, *large, "-o", tmp_path / "run.h5", "--mask", "bitwise")
    process.send_signal(signum)
    go_on(process)
    while process.poll() is None:
        process.send_signal(signum)
        time.sleep(0.002)
    assert process.returncode in (STOPPED[signum], -signum)
    assert list(tmp_path.iterdir()) == []


def test_a_signal_before_the_first_read(large: Pair, tmp_path: Path) -> None:
    process = start("ckptdiff.run.engine:execute", 1, *large, "-o", tmp_path / "run.h5")
    process.terminate()
    go_on(process)
    assert ended(process) == (143, "ckptdiff: terminated\n")
    assert list(tmp_path.iterdir()) == []


TIED = str(FIXTURES / "tied/base"), str(FIXTURES / "tied/tuned")
NAMED = {
    "diff": ["diff", *TIED, "-O", os.devnull, "-o"],
    "report": ["show", "RUN", "-O"],
    "spectra": ["spectra", "add", "RUN", "--spectra", "exact"],
    "masks": ["mask", "export", "RUN", "-o"],
    "patch": ["mask", "export", "RUN", "--layout", "patch", "-o"],
    "patched": ["patch", "apply", TIED[0], "PATCH", "-o"],
    "track": ["track", *TIED, "-o"],
    "lora": ["lora", *TIED, "--rank", "2", "-o"],
    "shira": ["mask", "export", "RUN", "--layout", "shira", "--rank", "2", "-o"],
}
"""Commands that make an output, whose name comes last."""


@pytest.mark.parametrize("command", NAMED)
def test_a_signal_just_before_the_output_gets_its_name(command: str, older: bytes, tmp_path: Path) -> None:
    run_file, patch = tmp_path / "run.h5", tmp_path / "patch.safetensors"
    run_file.write_bytes(older)
    if command == "patched":
        assert main(["mask", "export", str(run_file), "--layout", "patch", "-o", str(patch)]) == 0
    words = [{"RUN": str(run_file), "PATCH": str(patch)}.get(word, word) for word in NAMED[command]]
    folder = command in ("patched", "lora", "shira")
    if command != "spectra":
        words.append(str(tmp_path / ("out" if folder else "out.safetensors")))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    last = "staged:StagedFolder.commit" if folder else "hidden:Hidden.take_name"
    process = stopped_at(f"ckptdiff.files.{last}", 1, *words)
    assert len(list(tmp_path.iterdir())) == len(before) + 1
    process.terminate()
    go_on(process)
    code, err = ended(process)
    assert code == 143 and err.endswith("ckptdiff: terminated\n"), err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_callback_is_raised_where_someone_asks(signum: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda one: dropped.append(one.exc_type))

    class Callback:
        def __init__(self, act: Callable[[], None]) -> None:
            self._act = act

        def __del__(self) -> None:
            self._act()

    def wrong() -> None:
        raise ValueError("wrong")

    with signals_noted():
        raise_pending()  # there is none
        callback = Callback(lambda: signal.raise_signal(signum))
        del callback  # raises nothing
        assert dropped == []
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt) as raised:
                raise_pending()
            assert raised.value.args == (signum,)
        callback = Callback(wrong)
        del callback
    raise_pending()
    assert dropped == [ValueError]


def test_an_error_that_takes_the_place_of_a_signal(
    small: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As that of a pipe does whose reader had the same signal."""

    def lost(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("unable to write")

    monkeypatch.setattr(RunFileWriter, "add_mask_chunks", lost)
    before = sorted(tmp_path.iterdir())
    code = main(["diff", *map(str, small), "-o", str(tmp_path / "run.h5"), "--no-progress"])
    assert (code, capsys.readouterr()) == (130, ("", "ckptdiff: interrupted\n"))
    assert sorted(tmp_path.iterdir()) == before


def limited(size: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A run in a process whose files may not grow beyond a size: what a full disk looks like from inside."""
    code = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))\n"
        "from ckptdiff.cli import main\n"
        "sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "diff", *map(str, arguments), "--no-progress"]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_a_full_disk(small: Pair, out: Path) -> None:
    before = state(out)
    size = 200_000 if before else 100
    done = limited(size, *small, "-o", out, "--mask", "bitwise")
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("ckptdiff: error: cannot write the output: File too large\n")
    assert f"file:     {out}" in done.stderr and "bytes free" in done.stderr and "make room" in done.stderr
    assert state(out) == before


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x80\x3f")


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def replace(path: Path) -> None:
    copy = shutil.copy2(path, path.with_name("copy"))
    Path(copy).replace(path)


CHANGES = [rewrite, cut_short, append, replace, Path.unlink]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize(("when", "side"), [(Started, 0), (Started, 1), (StageProgress, 0)])
def test_a_file_that_changes_while_it_is_read(
    small: Pair, tmp_path: Path, change: Callable[[Path], None], io: Any, when: type[Event], side: int
) -> None:
    out = tmp_path / "out" / "run.h5"
    out.parent.mkdir()
    seen: list[type[Event]] = []

    def listen(event: Event) -> None:
        if type(event) is when and when not in seen:
            change(small[side])
        seen.append(type(event))

    os.utime(small[side], ns=(10**18, 10**18))
    with pytest.raises(ChangedFileError) as caught:
        run(*map(str, small), out=out, options=Options(io=io, threads=1), listener=listen)
    assert caught.value.file == str(small[side]) and caught.value.hint
    assert when in seen and Finished not in seen
    assert list(out.parent.iterdir()) == []


def test_the_command_line_says_what_changed(
    small: Pair, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptdiff.run import engine

    def shrink_first(io: str, room: int) -> Any:
        cut_short(small[1])
        return real(io, room)

    real = engine.open_shards
    monkeypatch.setattr(engine, "open_shards", shrink_first)
    before, size = state(out), small[1].stat().st_size
    code = main(["diff", *map(str, small), "-o", str(out), "--no-progress"])
    printed, err = capsys.readouterr()
    assert (code, printed) == (2, "") and state(out) == before
    assert err.startswith("ckptdiff: error: the shard changed while it was read\n")
    assert str(small[1]) in err and f"{size} bytes" in err and f"{size - 2} bytes" in err


def test_an_error_in_a_thread_ends_the_run(small: Pair, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptdiff.run import worker

    calls: list[int] = []

    def broken(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError("of the test")
        return real(*given)

    real = worker.compress_parts
    monkeypatch.setattr(worker, "compress_parts", broken)
    before = state(out)
    with pytest.raises(ZeroDivisionError, match="of the test"):
        run(*map(str, small), out=out, options=Options(threads=3))
    assert state(out) == before
    monkeypatch.undo()
    run(*map(str, small), out=out, options=Options(threads=3))
    with h5py.File(out) as file:
        assert file.attrs["complete"] == 1 and len(file["masks"]) == 3


def test_a_listener_that_raises_ends_the_run(small: Pair, out: Path) -> None:
    def listen(event: Event) -> None:
        if type(event) is StageProgress:
            raise LookupError("of the test")

    before = state(out)
    with pytest.raises(LookupError, match="of the test"):
        run(*map(str, small), out=out, listener=listen)
    assert state(out) == before
