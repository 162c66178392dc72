"""Keep the machine code of kernels that were compiled on the spot, where it is safe to keep it.

Numba stamps a cached function with its own source file only, so an edited callee would leave stale code in use, and it
trusts whatever the cache holds. Here the folder is named after a hash of every kernel source, of the compiler and of
the processor, belongs to the user alone (it holds pickles), and each entry carries a checksum. Without a writable place
kernels are compiled in every process; a damaged entry is compiled again.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import pickle
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache

from ckptdiff.jit import NotCachedError, refusing
from ckptdiff.kernel_library import kernel_sources, private_folder

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

logger = logging.getLogger("ckptdiff.kernel_cache")


def keep_code(dispatcher: Any) -> Any:
    """Have a function of Numba's keep its machine code; returns that function."""
    function = dispatcher.py_func
    folder = cache_folder()
    dispatcher._cache = _NoCache()
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
    return dispatcher


@functools.cache
def cache_folder() -> Path | None:
    """Folder of this version's machine code for the processor, or None if there is no safe and writable place."""
    return private_folder(fingerprint())


def processor_features() -> str:
    """What the processor that is compiled for can do, as LLVM names it: "+avx2,-avx512f,..."."""
    named: str | None = numba.config.CPU_FEATURES
    return llvmlite.binding.get_host_cpu_features().flatten() if named is None else named


def processor_name() -> str:
    """What processor is compiled for, with a hash of what it can do: equal ones run the same machine code."""
    name = numba.config.CPU_NAME or llvmlite.binding.get_host_cpu_name()
    return f"{platform.machine()} {name}, {hashlib.sha256(processor_features().encode()).hexdigest()[:8]}"


def fingerprint() -> str:
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


class _NoCache(NullCache):  # type: ignore[misc]
    """In place of a cache where there is none."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        if refusing.get():
            raise NotCachedError("there is no cache")


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
        if found is None and refusing.get():
            raise NotCachedError(self.cache_path)
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            logger.warning("could not keep a compiled kernel in %s: %s", self.cache_path, error)
