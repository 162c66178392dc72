"""Kernels that are missing are compiled by processes of their own, and what those cannot do is done here."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from patience import PATIENCE
from told_stages import told_stages

from ckptdiff.events import Event, Note, ignore
from ckptdiff.formats import FORMATS
from ckptdiff.jit import NotCachedError, only_cached
from ckptdiff.measure.cpu import CpuBackend
from ckptdiff.run import warm_up

TRIPLE = """
from ckptdiff.jit import kernel

@kernel
def triple(value):
    return 3 * value
"""
pytestmark = pytest.mark.usefixtures("empty_cache")
FIXTURE = Path(__file__).parents[2] / "fixtures" / "addition"


@pytest.fixture
def imported(tmp_path: Path) -> Callable[[], ModuleType]:
    """Import a tiny kernel afresh, as a new process would."""
    source = tmp_path / "triple.py"
    source.write_text(TRIPLE)

    def fresh() -> ModuleType:
        spec = importlib.util.spec_from_file_location("triple", source)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return fresh


def test_only_cached(imported: Callable[[], ModuleType]) -> None:
    module = imported()
    with only_cached(), pytest.raises(NotCachedError):
        module.triple(2)
    assert module.triple(2) == 6
    with only_cached():
        assert module.triple(3) == 9
        assert imported().triple(4) == 12
        with pytest.raises(NotCachedError):
            module.triple(2.5)  # another signature


def test_other_threads_may_compile(imported: Callable[[], ModuleType]) -> None:
    came = []
    with only_cached():
        thread = threading.Thread(target=lambda: came.append(imported().triple(2)))
        thread.start()
        thread.join()
    assert came == [6]


def test_without_a_cache_kernels_are_compiled_here(
    imported: Callable[[], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTDIFF_CACHE_DIR", "/proc/nowhere")
    module, told = imported(), list[Event]()
    calls_of(module, monkeypatch)
    monkeypatch.setattr(warm_up, "_start", lambda use: pytest.fail("a process was started in vain"))
    warm_up.load(CpuBackend(), warm_up.Uses((("mask", "2"),)), told.append)
    assert "each time" in noted(told) and list(told_stages(told)) == ["compiling"]
    with only_cached():
        assert module.triple(2) == 6


def noted(told: list[Event]) -> str:
    return "\n".join(event.text for event in told if isinstance(event, Note))


def calls_of(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let "mask" stand for a call of the tiny kernel."""
    monkeypatch.setattr(warm_up, "make_call", lambda worker, use: module.triple(int(use[1])))


@pytest.mark.parametrize("how", ["fails", "cannot be started", "is not Python"])
def test_what_cannot_be_compiled_apart_is_compiled_here(
    imported: Callable[[], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    how: str,
) -> None:
    module, told = imported(), list[Event]()
    calls_of(module, monkeypatch)
    if how == "fails":
        start = [sys.executable, "-c", "raise SystemExit(3)"]
        monkeypatch.setattr(warm_up, "_start", lambda use: subprocess.Popen(start))
    elif how == "cannot be started":
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python-is-gone"))
    else:
        other = tmp_path / "app"
        other.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        other.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(other))
    warm_up.load(CpuBackend(), warm_up.Uses((("mask", "2"),)), told.append)
    with only_cached():
        assert module.triple(2) == 6
    assert "once" in noted(told) and list(told_stages(told)) == ["compiling"]
    assert not (tmp_path / "started").exists()
    said = {
        "fails": "compiling mask 2 apart ended with 3",
        "cannot be started": "no other can be start",
    }
    assert len(caplog.messages) == (how in said) and all(said[how] in message for message in caplog.messages)


def test_what_is_cached_starts_no_process(imported: Callable[[], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    imported().triple(2)
    calls_of(imported(), monkeypatch)
    monkeypatch.setattr(warm_up, "_start", lambda use: pytest.fail("a process was started in vain"))
    warm_up.load(CpuBackend(), warm_up.Uses((("mask", "2"),)), lambda event: pytest.fail("nothing is compiled"))


def test_what_is_seldom_called_is_compiled_along_and_never_loaded(
    imported: Callable[[], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[warm_up.Use]] = []
    calls_of(imported(), monkeypatch)
    monkeypatch.setattr(warm_up, "compile_apart", lambda missing, told: given.append(list(missing)))
    asked = warm_up.Uses((("mask", "2"),), (("mask", "seldom"),))
    for _ in range(2):
        warm_up.load(CpuBackend(), asked, ignore)
    assert given == [[("mask", "2"), ("mask", "seldom")]]


def test_uses() -> None:
    bf16, f32 = FORMATS["bf16"], FORMATS["f32"]
    one, two = (bf16, bf16, bf16), (f32, f32, f32)
    words = ("bf16", "bf16", "bf16"), ("f32", "f32", "f32")
    asked = warm_up.uses({one}, {one, two}, 4096)
    scans = ("alike", *words[0]), ("alone", *words[0]), ("alone", *words[1])
    assert asked.certain == (*scans, ("row",), ("refine", *words[1]), ("mask", "4096"))
    assert asked.seldom == (("refine", *words[0]),)
    asked = warm_up.uses({one}, set(), 0)
    assert asked.certain == (("alike", *words[0]),)
    assert asked.seldom == (("alone", *words[0]), ("row",), ("refine", *words[0]))
    asked = warm_up.uses(set(), {one}, 0)
    assert asked.certain == (("alone", *words[0]), ("row",))
    assert asked.seldom == (("refine", *words[0]),)
    assert warm_up.uses(set(), set(), 0) == warm_up.Uses(())


def test_another_process_takes_the_same_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else stands in sys.path, and lies in the working directory; a mask of 100 bytes needs no kernel."""
    (tmp_path / "numba.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", ".", tmp_path / "nowhere", *sys.path])
    with warm_up._start(("mask", "100")) as process:
        assert process.wait(PATIENCE) == 0


def test_another_process_keeps_kernels_where_this_one_finds_them() -> None:
    """Numba knows a kernel by its constants too, of which the docstring is one."""
    code = "from ckptdiff.run.warm_up import _start; run = _start(('mask', '100')); print(run.wait(), run.args)"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("0 ") and done.stdout.count("'-O'") == 2


def test_an_exception_ends_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def start(use: warm_up.Use) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "60"]))
        return started[-1]

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(warm_up, "_start", start)
    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        warm_up.compile_apart([("mask", str(size)) for size in range(3)])
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2


def diff(folder: Path) -> subprocess.Popen[str]:
    """A run that, as an installed command does, takes no module from its working directory."""
    paths = [path for path in sys.path if path]
    code = f"import sys; sys.path[:] = {paths!r}; from ckptdiff.cli import main; sys.exit(main())"
    sides = [str(FIXTURE / side) for side in ("base", "tuned")]
    return subprocess.Popen(
        [sys.executable, "-I", "-c", code, "diff", *sides, "-o", "run.h5", "-v", "--no-progress"],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="needs /proc")
def test_a_first_run(tmp_path: Path) -> None:
    """Stopped while it compiles, it leaves nothing; let alone, it is as right as a later one and hardly larger."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "numba.py").write_text("raise SystemExit('a module of the working directory')")
    process = diff(folder)
    while len(compiling := children(process)) < 2:
        assert process.poll() is None
        time.sleep(0.001)
    process.terminate()
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143 and err.endswith("ckptdiff: terminated\n"), err
    deadline = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{pid}").exists() for pid in compiling):
        assert time.monotonic() < deadline, "a compiling process outlives the run"
        time.sleep(0.01)
    assert [path.name for path in folder.iterdir()] == ["numba.py"]

    reports, sizes, said = [], [], []
    for _ in range(2):
        process = diff(folder)
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0 and "ended with" not in err, err
        memory = re.search(r"projected memory (\d+) MiB", err)
        assert memory is not None
        reports.append(out)
        sizes.append(int(memory[1]))
        said.append("compiling kernels" in err)
    assert said == [True, False]
    assert reports[0] == reports[1] != "" and abs(sizes[0] - sizes[1]) < 30
