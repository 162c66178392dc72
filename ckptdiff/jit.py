"""Compile kernels, and keep their machine code where it is safe to keep it.

Numba stamps a cached function with its own source file only, so an edited callee would leave stale code in use, and it
trusts whatever the cache holds. Here the folder is named after a hash of every kernel source, of the compiler and of
the processor, belongs to the user alone (it holds pickles), and each entry carries a checksum. Without a writable place
kernels are compiled in every process; a damaged entry is compiled again.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pickle
import platform
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar, cast

import llvmlite.binding
import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

Function = TypeVar("Function", bound=Callable[..., Any])

_SOURCES = (
    "jit.py",
    "formats.py",
    "measure/partial.py",
    "checkpoint/code_formats.py",
    "codes/*.py",
    "*/kernels/*.py",
    "deflate/*.py",
)
"""What machine code is made of, in the package: kernels, what they call, and the constants of both."""

_SETTINGS = (
    "BOUNDSCHECK",
    "DEBUGINFO_DEFAULT",
    "ENABLE_AVX",
    "ENABLE_PROFILING",
    "LOOP_VECTORIZE",
    "OPT",
    "SLP_VECTORIZE",
)
"""Settings of Numba, from its environment variables, that change machine code; some make it half as fast."""

_OPTIONS = {"nogil": True, "error_model": "numpy"}
"""A division by zero gives what NumPy gives: to raise an error would take code around every division."""
STEP = {**_OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""Only kernels are called from Python; the wrappers of what they call would cost a third of the compilation."""

_refusing: ContextVar[bool] = ContextVar("refusing", default=False)
logger = logging.getLogger("ckptdiff.jit")


class NotCachedError(Exception):
    """A kernel would have to be compiled."""


@contextmanager
def only_cached() -> Iterator[None]:
    """Within this, in this thread, a kernel whose machine code is not in the cache raises :class:`NotCachedError`.

    Where there is no cache, kernels are compiled all the same.
    """
    before = _refusing.set(True)
    try:
        yield
    finally:
        _refusing.reset(before)


def helper(function: Function) -> Function:
    """Compile a step that kernels call; it is inlined into them and never cached by itself."""
    return cast(Function, numba.njit(**STEP)(function))


def reducer(function: Function) -> Function:
    """Compile a step whose floating sums may be reordered, as vector sums need; the order depends on the code alone."""
    return cast(Function, numba.njit(fastmath={"reassoc", "nsz", "contract"}, **STEP)(function))


def kernel(function: Function) -> Function:
    """Compile a function that runs without the GIL, and cache its machine code."""
    dispatcher = numba.njit(no_cfunc_wrapper=True, **_OPTIONS)(function)
    folder = cache_folder()
    if folder is not None:
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(folder)
        try:
            cache = _Cache(function)
        finally:
            numba.config.CACHE_DIR = before
        if Path(cache.cache_path).parent == folder:
            dispatcher._cache = cache
        else:  # Numba's next choice; no hash of the sources guards it
            logger.warning("%s is not cached: no folder for it in %s", function.__name__, folder)
    return cast(Function, dispatcher)


@functools.cache
def cache_folder() -> Path | None:
    """Folder of this version's machine code for the processor, or None if there is no safe and writable place."""
    return private_folder(_fingerprint())


def private_folder(name: str) -> Path | None:
    """A folder for machine code that nobody but the user can write to, or None if there is no such place.

    ``CKPTDIFF_CACHE_DIR`` names its parent; otherwise it lies in the user's cache folder.
    """
    named = os.environ.get("CKPTDIFF_CACHE_DIR")
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ckptdiff")
    try:
        folder = Path(named or user, name).expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"{folder} can be written by others")
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        logger.warning("kernels are compiled anew in every process, no cache folder can be used: %s", error)
        return None
    return folder


def processor_features() -> str:
    """What the processor that is compiled for can do, as LLVM names it: "+avx2,-avx512f,..."."""
    named: str | None = numba.config.CPU_FEATURES
    return llvmlite.binding.get_host_cpu_features().flatten() if named is None else named


def processor_name() -> str:
    """What processor is compiled for, with a hash of what it can do: equal ones run the same machine code."""
    name = numba.config.CPU_NAME or llvmlite.binding.get_host_cpu_name()
    return f"{platform.machine()} {name}, {hashlib.sha256(processor_features().encode()).hexdigest()[:8]}"


def kernel_sources() -> list[Path]:
    """The modules that machine code is made of."""
    package = Path(__file__).parent
    return sorted({source for pattern in _SOURCES for source in package.glob(pattern)})


def _fingerprint() -> str:
    """Hash of all that machine code depends on."""
    digest = hashlib.sha256()
    for source in kernel_sources():
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    for version in (
        numba.__version__,
        platform.python_version(),
        numba.config.CPU_NAME or llvmlite.binding.get_host_cpu_name(),
        processor_features(),
    ):
        digest.update(version.encode() + b"\0")
    for setting in _SETTINGS:
        digest.update(f"{setting}={getattr(numba.config, setting, None)}".encode() + b"\0")
    return digest.hexdigest()[:20]


class _Entries(IndexDataCacheFile):  # type: ignore[misc]
    """One file per compiled signature, named after it and with a checksum: damaged machine code must not run.

    Numba's own index file is not used; two processes that add to it at the same time can lose or swap entries.
    """

    def save(self, key: Any, data: Any) -> None:
        payload = self._dump(data)
        self._save_data(self._entry(key), (hashlib.sha256(payload).digest(), payload))

    def load(self, key: Any) -> Any:
        try:
            checksum, payload = self._load_data(self._entry(key))
        except FileNotFoundError:
            return None
        if hashlib.sha256(payload).digest() != checksum:
            raise pickle.UnpicklingError("checksum differs")
        return pickle.loads(payload)

    def _entry(self, key: Any) -> str:
        name: str = self._data_name(0)
        return f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.{name}"


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's cache of one function, except that trouble with it is logged and survived."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file.__class__ = _Entries

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
        except Exception as error:  # unpickling damaged bytes can raise anything
            logger.warning("dropped a damaged kernel from %s: %s", self.cache_path, error)
            found = None
        if found is None and _refusing.get():
            raise NotCachedError(self.cache_path)
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            logger.warning("could not keep a compiled kernel in %s: %s", self.cache_path, error)
