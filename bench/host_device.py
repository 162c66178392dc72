"""Run a Python program with the host device of the tests in the place of a GPU: what `on_gpu.py --rehearse` puts first.

    python bench/host_device.py FOLDER SCRIPT ARGUMENTS...
    python bench/host_device.py FOLDER -m MODULE ARGUMENTS...

The program finds "a GPU" that runs the shipped kernels on the processor, late and in any order it may. They are built
with g++ into FOLDER when they are first asked for. Nothing else of the program is touched. Pytest, and the workers that
it starts, get the same device through this module as a plugin.
"""

from __future__ import annotations

import fcntl
import functools
import os
import runpy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = "CKPTDIFF_HOST_DEVICE"
"""Names the folder of built kernels to the processes that pytest starts."""
THREADS = 64
"""Threads of a block, fewer than on a GPU: each is a fiber."""
MEMORY = 400 << 20


def install(folder: Path) -> None:
    """Let this process find the host device where it looks for a GPU."""
    sys.path[:0] = [str(ROOT / "tests" / "cuda"), str(ROOT / "tests")]
    from host_arrays import ArrayGpu, library_on
    from host_kernels import COMPILER, Build, Library

    from ckptdiff.measure.cuda import choice, gpu
    from ckptdiff.spectra import spectra_gpu

    if COMPILER is None:
        raise SystemExit("g++ is missing: the kernels cannot run on this CPU")
    folder.mkdir(parents=True, exist_ok=True)

    @functools.cache
    def library(base: str, tuned: str, compare: str) -> Library:
        with (folder / f"{base}-{tuned}-{compare}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be building it
            found = list(folder.glob(f"{base}-{tuned}-{compare}-*.bin"))
            if not found:
                with tempfile.TemporaryDirectory(dir=folder) as unfinished:
                    built = Build(base, tuned, compare, THREADS).make(Path(unfinished))
                    found = [built.rename(folder / built.name)]
        return Library(found[0], THREADS)

    class HostDevice(ArrayGpu):
        """The host device with the facts that `doctor` prints of a GPU."""

        name = "cuda:0"

        def __init__(self, index: int = 0) -> None:
            super().__init__(library, processors=1, memory=MEMORY)
            self.index = index
            self.properties: dict[str, Any] = {"name": b"host device", "major": 9, "minor": 0}
            runtime = SimpleNamespace(driverGetVersion=lambda: 0, runtimeGetVersion=lambda: 0)
            self.cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))

    choice.find_gpu = spectra_gpu.find_gpu = HostDevice
    spectra_gpu.library_on = library_on
    gpu.CupyGpu = HostDevice


def pytest_configure() -> None:
    """Do the same in a process that pytest started."""
    if FOLDER in os.environ:
        install(Path(os.environ[FOLDER]))


def main(arguments: Sequence[str]) -> None:
    """Command line entry."""
    folder, *program = str(Path(arguments[0]).absolute()), *arguments[1:]
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {FOLDER: folder, "PYTEST_PLUGINS": "host_device", "PYTHONPATH": os.pathsep.join(paths)}
    install(Path(folder))
    if program[0] == "-m":
        sys.argv = program[1:]
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path.insert(0, str(Path(program[0]).parent))
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
