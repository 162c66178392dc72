"""The command line over a fake engine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_engine import FakeEngine

import ckptdiff.api
import ckptdiff.lora.extract  # noqa: F401  (both keep the engine that they are first imported with: the real one)
from ckptdiff.cli import main
from ckptdiff.figures.result import Diff

_HARNESS = """
import sys
sys.path[:0] = [{tests!r}, {cli!r}]
import fake_engine, synthetic_diffs
diff = synthetic_diffs.build_diff(synthetic_diffs.llama_facts({layers}))
fake_engine.install(fake_engine.FakeEngine(diff, pause={pause}))
from ckptdiff.cli import main
sys.exit(main())
"""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def engine(diff: Diff, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """The engine of this test; its `diff` may be replaced. Its runs take no time, however busy the machine is."""
    fake = FakeEngine(diff)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("CKPTDIFF_DEBUG", raising=False)
    return fake


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """``cli("diff", "a", "b")``: run main() in this process."""

    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def written(diff: Diff, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file that the command line writes of this engine."""
    path = tmp_path_factory.mktemp("written") / "run.h5"
    with pytest.MonkeyPatch.context() as patch:
        for name, module in FakeEngine(diff).modules().items():
            patch.setitem(sys.modules, name, module)
        assert main(["diff", "base", "tuned", "-o", str(path), "-O", os.devnull]) == 0
    return path


@pytest.fixture
def run_file(written: Path, engine: FakeEngine, tmp_path: Path) -> Path:
    """A run file that may be changed."""
    return Path(shutil.copyfile(written, tmp_path / "run.h5"))


@pytest.fixture
def spawn() -> Callable[..., subprocess.Popen[bytes]]:
    """``spawn(arguments, layers=2, pause=0)``: main() over a fake engine in a process of its own."""

    def start(
        *arguments: str | Path,
        layers: int = 2,
        pause: float = 0.0,
        stdout: int = subprocess.PIPE,
        pipesize: int = -1,
    ) -> subprocess.Popen[bytes]:
        here = Path(__file__).parent
        code = _HARNESS.format(tests=str(here.parent), cli=str(here), layers=layers, pause=pause)
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=stdout,
            stderr=subprocess.PIPE,
            pipesize=pipesize,
        )

    return start
