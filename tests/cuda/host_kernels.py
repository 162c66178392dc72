"""The shipped kernels, built by g++ for the CPU: one library for each pair of stored formats and compare format."""

from __future__ import annotations

import ctypes
import fcntl
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ckptdiff.measure.cuda.compiled import NAMES

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "cuda"
TESTED = [
    ("bf16", "bf16", "bf16"),
    ("f16", "f16", "f16"),
    ("f32", "f32", "f32"),
    ("f64", "f64", "f64"),
    ("f8_e4m3", "f8_e4m3", "f8_e4m3"),
    ("f8_e5m2", "f8_e5m2", "f8_e5m2"),
    ("f32", "f32", "bf16"),
    ("bf16", "f32", "bf16"),
    ("f64", "f16", "bf16"),
    ("f8_e4m3", "f8_e5m2", "bf16"),
    ("f8_e5m2", "f16", "f16"),
    ("bf16", "f16", "f32"),
    ("f16", "f64", "f64"),
]
"""Stored formats and compare format of the pairs that are built; each format, each kind of cast."""
QUICK = TESTED[:8]
"""Those of them that a quick run takes: each format, and a cast of one side and of both."""
COMPILER = shutil.which("g++")
FLAGS = ("-std=c++20", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


@dataclass(frozen=True)
class Build:
    """How to build a library."""

    base: str
    tuned: str
    compare: str
    threads: int = 512
    flags: tuple[str, ...] = ("-O1",)
    kernels: Path = KERNELS

    def make(self, folder: Path, source: str = "kernels.cpp", shared: bool = True) -> Path:
        """Build into a folder, unless it is there, or another process is about to build it there."""
        flags = "".join(self.flags).replace("-", "_").replace("=", "_")
        path = folder / f"{self.base}-{self.tuned}-{self.compare}-{self.threads}{flags}-{source}.bin"
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                self._compile(path, source, shared)
        return path

    def _compile(self, path: Path, source: str, shared: bool) -> None:
        formats = zip(("BASE", "TUNED", "COMPARE"), (self.base, self.tuned, self.compare), strict=True)
        defines = [f"-D{side}={NAMES[name]}" for side, name in formats]
        how = ["-shared", "-fPIC"] if shared else []
        command = [COMPILER, *FLAGS, *self.flags, *how, f"-I{self.kernels}", f"-DTHREADS={self.threads}", *defines]
        made = path.with_suffix(".made")
        subprocess.run([*command, "-o", made, HERE / "host" / source], check=True)
        made.rename(path)


class Library:
    """A loaded library."""

    def __init__(self, path: Path, threads: int) -> None:
        self._library, self._threads = ctypes.CDLL(str(path)), threads

    def launch(self, kernel: str, blocks: int, args: list[Any], seed: int = 0, threads: int | None = None) -> None:
        """Run a kernel to its end.

        Arrays of more than one element are memory, and go by address, as does an array that is wrapped in a list;
        scalars and arrays of one element go by value.
        """
        values = [_by_value(argument) for argument in args]
        addresses = (ctypes.c_void_p * len(values))(*[value.ctypes.data for value in values])
        run = getattr(self._library, f"launch_{kernel}")
        run(ctypes.c_uint(blocks), ctypes.c_uint(threads or self._threads), ctypes.c_uint(seed), addresses)

    @contextmanager
    def flushing(self) -> Iterator[None]:
        """Within this, kernels take subnormal numbers for zero, as CUDA's do that are compiled with -ftz=true."""
        self._library.set_flush_to_zero(ctypes.c_bool(True))
        try:
            yield
        finally:
            self._library.set_flush_to_zero(ctypes.c_bool(False))

    def sizes(self) -> list[int]:
        """Bytes of Tile, Record, ScanSettings, Search, CodeBox, Codes and Bin."""
        return list((ctypes.c_uint * 7).in_dll(self._library, "layout_sizes"))


def _by_value(argument: Any) -> np.ndarray:
    if argument is None:
        return np.zeros(1, np.uint64)
    if isinstance(argument, list):
        return np.array([argument[0].ctypes.data], np.uint64)
    return np.array([argument.ctypes.data], np.uint64) if argument.size != 1 else np.atleast_1d(argument)
