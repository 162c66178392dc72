"""Kernels built once in a session, by whichever of its processes needs them first, into a temporary folder."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from host_kernels import COMPILER, QUICK, Build, Library

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
