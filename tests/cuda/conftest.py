"""Kernels built once in a session, by whichever of its processes needs them first; and spectra on the host device."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from host_arrays import ArrayGpu, library_on
from host_kernels import COMPILER, QUICK, Build, Library

from ckptdiff.options import Options
from ckptdiff.run import planning
from ckptdiff.run.devices import open_device
from ckptdiff.spectra import spectra_gpu
from ckptdiff.spectra.gpu_panels import PanelSlots

Libraries = Callable[..., Library]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory, request) -> Iterator[Libraries]:
    """Gives the library of a pair of formats; those that every run needs are under way from the first call on."""
    if COMPILER is None:
        pytest.skip("g++ is missing: the kernels cannot run on this CPU")
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        folder = folder.parent  # which the workers of pytest-xdist have in common
    folder = folder / "kernels"
    folder.mkdir(exist_ok=True)
    pool = ThreadPoolExecutor(2)
    builds: dict[Build, Future] = {}

    lock = threading.Lock()

    def start(build: Build) -> Future:
        with lock:
            if build not in builds:
                builds[build] = pool.submit(build.make, folder)
            return builds[build]

    def get(base: str, tuned: str, compare: str, threads: int = 64) -> Library:
        future = start(Build(base, tuned, compare, threads))
        if os.environ.get("CKPTDIFF_TEST_BUILD_ALL") != "0":
            for names in QUICK:
                start(Build(*names, 64))
        return Library(future.result(), threads)

    yield get
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def on_gpu(libraries: Libraries, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ArrayGpu]:
    """Let the spectra of `--device cuda` be measured on a host device, and all else on the processor."""

    def use(seed: int = 0, **options: Any) -> ArrayGpu:
        gpu = ArrayGpu(libraries, seed, processors=1, **options)
        monkeypatch.setattr(spectra_gpu, "find_gpu", lambda index: gpu)
        monkeypatch.setattr(spectra_gpu, "library_on", library_on)
        monkeypatch.setattr(spectra_gpu, "PanelSlots", partial(PanelSlots, piece=1 << 13))
        monkeypatch.setattr(spectra_gpu, "wrong_spectra", lambda slots: "")  # it takes seconds
        monkeypatch.setattr(planning, "open_device", lambda options: open_device(Options(device="cpu")))
        return gpu

    return use
