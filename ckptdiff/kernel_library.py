"""Call kernels of the library that was compiled when the package was built, without Numba.

A call hands over one room of 64-bit words: integers, floats as float64, and addresses of NumPy's array objects, whose
data, shape and strides compiled code reads as every extension of NumPy does. Results take the place of the words. The
types that a kernel is called with name the function that serves it (:func:`symbol_of`), so there is no table beside the
library. There is a file for each level of the processor's instructions, and it ends with a :data:`MARK`, a hash of the
sources it was made of and one of its own bytes.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import stat
import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ckptdiff.errors import OptionError

__all__ = ["LEVELS", "MARK", "BuiltKernel", "BuiltKernels", "UnlistedTypeError", "flatten", "library", "private_folder"]

_SOURCES = (
    "jit.py",
    "kernel_library.py",
    "formats.py",
    "measure/partial.py",
    "checkpoint/code_formats.py",
    "codes/*.py",
    "*/kernels/*.py",
    "deflate/*.py",
)
"""What machine code is made of, in the package: kernels, what they call, and the constants of both."""

_V2 = "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3"
_V3 = f"{_V2} abm avx avx2 bmi1 bmi2 f16c fma movbe"
_V4 = f"{_V3} avx512f avx512bw avx512cd avx512dq avx512vl avx512vbmi avx512_vbmi2 avx512_bitalg avx512_vpopcntdq"
LEVELS = {"v4": _V4, "v3": _V3, "v2": _V2}
"""Levels of x86-64, the best first, and the flags in /proc/cpuinfo that each needs. Beyond what the name stands for
elsewhere, v4 moves chosen lanes of a register together (VBMI2)."""
FOLDER = Path(__file__).parent / "_kernels"
MARK = b"ckptdiff kernels"

_HEADER = 16
"""Bytes of a Python object before what NumPy keeps in an array: address of the data, dimensions, shape, strides."""
_LAYOUTS = {
    flags: (layout if flags & 0x400 else layout.lower())
    for flags in (0, 1, 2, 3, 0x400, 0x401, 0x402, 0x403)
    for layout in ("C" if flags & 1 else "F" if flags & 2 else "A",)
}
"""By NumPy's flags: contiguous in the order of C or of Fortran or neither, in lower case if read-only."""
_SCALARS: dict[type, str] = {
    bool: "?", np.bool_: "?", int: "q", float: "d",
    np.int64: "q", np.uint64: "Q", **{np.dtype(char).type: char for char in "bBhHiIfd"},
}  # fmt: skip

logger = logging.getLogger("ckptdiff.kernel_library")


class UnlistedTypeError(Exception):
    """An argument of a type that no built kernel takes."""


def flatten(values: tuple[Any, ...], key: list[Any], words: list[Any]) -> None:
    """Append what tells the types of arguments to ``key``, and what is handed over to ``words``."""
    for value in values:
        kind = type(value)
        if kind is np.ndarray:
            key += value.dtype, value.ndim, _LAYOUTS[value.flags.num & 0x403]
            words.append(id(value))
        elif kind is int:
            key.append("q" if -1 << 63 <= value < 1 << 63 else "Q")
            words.append(value)
        elif kind in _SCALARS:
            key.append(_SCALARS[kind])
            words.append(value.item() if isinstance(value, np.generic) else value)
        elif value is None:
            key.append(None)
        elif isinstance(value, tuple):
            key.append(len(value))
            flatten(value, key, words)
        else:
            raise UnlistedTypeError(kind)


def symbol_of(name: str, key: Sequence[Any]) -> str:
    """Name in the library of the function for a kernel and the types of its arguments."""
    words = [part.descr if isinstance(part, np.dtype) else part for part in key]
    return "k" + hashlib.sha256(f"{name}{words}".encode()).hexdigest()[:24]


class BuiltKernel:
    """A function of the library, for one kernel and one list of types.

    Parameters
    ----------
    function : callable
        Takes a room of words; other than 0 if memory was short.
    key : sequence
        From :func:`flatten`.
    result : str
        What comes back, in characters of :mod:`struct`: "" for None, "q", or in parentheses for a tuple.
    """

    def __init__(self, function: Callable[[Any], int], key: Sequence[Any], result: str) -> None:
        self._function = function
        # Of an array's three parts the first stands for the word, and a tuple is no word by itself.
        parts = [
            "Q" if isinstance(part, np.dtype) else {"f": "d"}.get(part, part if part in "qQd" else "q")
            for i, part in enumerate(key)
            if isinstance(part, (np.dtype, str)) and not (i > 1 and isinstance(key[i - 2], np.dtype))
        ]
        self._pack_into = struct.Struct("=" + "".join(parts)).pack_into
        self._bools = "?" in result
        self._is_tuple = result.startswith("(")
        self._result = result.strip("()")
        unpacked = self._result.replace("?", "q")
        self._unpack_from = struct.Struct("=" + unpacked).unpack_from
        self._room = ctypes.c_int64 * max(len(parts), len(unpacked), 1)

    def __call__(self, words: Sequence[Any]) -> Any:
        """Call it with words of :func:`flatten`, the arrays of which someone keeps alive."""
        room = self._room()
        self._pack_into(room, 0, *words)
        if self._function(room):
            raise MemoryError("a compiled kernel found no memory")
        if not self._result:
            return None
        found = self._unpack_from(room)
        if self._bools:
            found = tuple(bool(one) if kind == "?" else one for one, kind in zip(found, self._result, strict=True))
        return found if self._is_tuple else found[0]


class BuiltKernels(dict[tuple[Any, ...], "BuiltKernel | None"]):
    """Functions of the library for one kernel, by the types of arguments; None where it has none."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __missing__(self, key: tuple[Any, ...]) -> BuiltKernel | None:
        self[key] = entry = self._find(key)
        return entry

    def _find(self, key: tuple[Any, ...]) -> BuiltKernel | None:
        opened = library()
        symbol = symbol_of(self._name, key)
        if opened is None or not hasattr(opened, symbol):
            return None
        result = ctypes.c_char_p.in_dll(opened, f"{symbol}_result").value
        assert result is not None
        function = opened[symbol]
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int32
        return BuiltKernel(function, key, result.decode())


@cache
def library() -> ctypes.CDLL | None:
    """The library that serves this process, None if kernels are compiled on the spot."""
    asked = os.environ.get("CKPTDIFF_KERNELS", "")
    if os.sep not in asked:
        return open_library(FOLDER, asked)
    if not Path(asked).is_dir():
        raise OptionError(f"CKPTDIFF_KERNELS is {asked!r}, and there is no such folder")
    return open_library(Path(asked), "")


def open_library(folder: Path, asked: str) -> ctypes.CDLL | None:
    """The best library in a folder for the processor, None if there is none; why one does not serve is logged.

    ``asked`` is the variable ``CKPTDIFF_KERNELS``: a level, "jit" for no library, or "" for the best level. Raises an
    OptionError if it is something else.
    """
    if asked not in ("", "jit", "baseline", *LEVELS):
        raise OptionError(f"CKPTDIFF_KERNELS is {asked!r}, not one of {', '.join(LEVELS)} and jit")
    levels = [asked] if asked else [*filter(has_level, LEVELS), "baseline"]
    paths = {level: folder / path_of(level).name for level in levels}
    level = next((level for level, path in paths.items() if path.exists()), asked)
    if level in ("", "jit"):
        if not level and (others := sorted(folder.glob(f"{platform.machine()}-*.so"))):
            logger.warning("kernels are compiled on the spot, %s is for another processor", others[0])
        return None
    path = paths[level]
    problem = fault_of(path, level)
    if not problem:
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:  # another architecture
            problem = str(error).removeprefix(f"{path}: ")
    logger.warning("kernels are compiled on the spot, %s cannot be used: %s", path, problem)
    return None


def kernels_in_use() -> str:
    """Which kernels a run calls, as far as they are built: "x86_64-v3"; "compiled on the spot" without a library."""
    opened = library()
    return "compiled on the spot" if opened is None else Path(opened._name).stem


def path_of(level: str) -> Path:
    """Where the library for a level lies."""
    return FOLDER / f"{platform.machine()}-{level}.so"


def processor_level() -> str:
    """The best level of this processor; "baseline" where levels have no names."""
    return next((level for level in LEVELS if has_level(level)), "baseline")


def has_level(level: str) -> bool:
    """Whether this processor has all instructions of a level."""
    return level == "baseline" or set(LEVELS[level].split()) <= processor_flags()


@cache
def processor_flags() -> frozenset[str]:
    """What the processor can do, as Linux names it; empty elsewhere."""
    try:
        with Path("/proc/cpuinfo").open() as lines:  # a part for each core, of which the first will do
            for line in lines:
                name, _, flags = line.partition(":")
                if name.strip() in ("flags", "Features"):
                    return frozenset(flags.split())
    except OSError:
        pass
    return frozenset()


def fault_of(path: Path, level: str) -> str:
    """Why the library of a level cannot be used, "" if it can as far as its bytes tell."""
    if not has_level(level):
        return f"this processor lacks instructions of {level}"
    try:
        data = path.read_bytes()
    except OSError as error:
        return error.strerror or "it cannot be read"
    end = len(data) - len(MARK) - 64
    mark, sources, own = data[end:-64], data[-64:-32], data[-32:]
    if end < 0 or mark != MARK:
        return "its end was cut off, or what it was stripped of is missing"
    if hashlib.sha256(data[:-32]).digest() != own:
        return "it is damaged"
    if sources != sources_hash():
        return "it was built of other sources; install the package again"
    return "" if _reads_arrays() else "this Python keeps arrays in another way"


def marked(data: bytes) -> bytes:
    """A library with what :func:`fault_of` looks for."""
    data += MARK + sources_hash()
    return data + hashlib.sha256(data).digest()


def kernel_sources() -> list[Path]:
    """The modules that machine code is made of."""
    package = Path(__file__).parent
    return sorted({source for pattern in _SOURCES for source in package.glob(pattern)})


@cache
def sources_hash() -> bytes:
    """Hash of those modules, and of what makes a library of them."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for source in (*kernel_sources(), package / "kernel_compiler.py", package / "kernel_runtime.c"):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.digest()


def _reads_arrays() -> bool:
    """Whether arrays lie in memory as compiled code expects: the interface that NumPy publishes says the same."""
    if object.__basicsize__ != _HEADER:  # a Python without a global lock, or one for debugging
        return False
    array = np.zeros((3, 4), np.uint16)[::2, 1:]
    pointers = (ctypes.c_int64 * 5).from_address(id(array) + _HEADER)
    shape, strides = ((ctypes.c_int64 * 2).from_address(pointers[at]) for at in (2, 3))
    return (pointers[0], *shape, *strides) == (array.ctypes.data, *array.shape, *array.strides)


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
