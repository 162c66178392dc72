"""Declare compiled functions, and call them: from the library that was built with the package, or compiled on the spot.

Numba takes half a second and 70 MB to import, which most commands have no use for. So what is declared here becomes
Numba's when something has to be compiled, and what intrinsics are written with is imported when they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from importlib import import_module
from typing import Any, TypeVar, cast

from ckptdiff.kernel_library import BuiltKernels, UnlistedTypeError, flatten

Function = TypeVar("Function", bound=Callable[..., Any])

_OPTIONS = {"nogil": True, "error_model": "numpy"}
"""A division by zero gives what NumPy gives: to raise an error would take code around every division."""
STEP = {**_OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""Only kernels are called from Python; the wrappers of what they call would cost a third of the compilation."""
KERNEL = {**_OPTIONS, "no_cfunc_wrapper": True}

refusing: ContextVar[bool] = ContextVar("refusing", default=False)
"""Whether a kernel that would have to be compiled raises an error instead."""
recorder: ContextVar[Callable[[Kernel, tuple[Any, ...]], Any] | None] = ContextVar("recorder", default=None)
"""Takes calls of kernels in place of them."""
_overloads: list[Callable[[], Any]] = []
"""Declared, and not yet Numba's."""
_lock = threading.RLock()


class NotCachedError(Exception):
    """A kernel would have to be compiled."""


@contextmanager
def only_cached() -> Iterator[None]:
    """Within this, in this thread, a kernel that is neither built nor in the cache raises :class:`NotCachedError`."""
    before = refusing.set(True)
    try:
        yield
    finally:
        refusing.reset(before)


class Later:
    """A module that is imported when something in it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name), name)


class Step:
    """A function that kernels call. Numba asks for its type as it compiles one."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self.function = function
        self._options = options
        self.__doc__ = function.__doc__

    @cached_property
    def dispatcher(self) -> Any:
        """What Numba makes of it."""
        return declared(lambda numba: numba.njit(**self._options)(self.function))

    @property
    def _numba_type_(self) -> Any:
        return self.dispatcher._numba_type_


class Intrinsic:
    """A function that makes LLVM IR, as :func:`numba.extending.intrinsic` takes it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    @cached_property
    def _numba_type_(self) -> Any:
        self._kept = declared(lambda numba: numba.extending.intrinsic(self.function))
        context = import_module("numba.core.registry").cpu_target.typing_context
        context.refresh()
        return context.resolve_value_type(self._kept)


class Kernel:
    """A compiled function that Python calls, and that runs without the GIL."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = f"{function.__module__}.{function.__qualname__}"
        self.__doc__ = function.__doc__
        self._entries = BuiltKernels(self.name)

    def __call__(self, *arguments: Any) -> Any:
        """Call what was built for arguments of these types, else what Numba compiles."""
        record = recorder.get()
        if record is not None:
            return record(self, arguments)
        key: list[Any] = []
        words: list[Any] = []
        try:
            flatten(arguments, key, words)
            entry = self._entries[tuple(key)]
        except UnlistedTypeError:
            entry = None
        return self.dispatcher(*arguments) if entry is None else entry(words)

    @cached_property
    def dispatcher(self) -> Any:
        """What Numba compiles as it is called, and keeps the machine code of."""
        from ckptdiff.kernel_cache import keep_code

        with _lock:
            return declared(lambda numba: keep_code(numba.njit(**KERNEL)(self.function)))

    @cached_property
    def _step(self) -> Step:
        """What it is to a kernel that calls it."""
        return Step(self.function, STEP)

    @property
    def _numba_type_(self) -> Any:
        return self._step._numba_type_


def declared(declare: Callable[[Any], Any]) -> Any:
    """What a declaration makes with Numba, of which everything that was declared so far is known then."""
    numba = import_module("numba")
    import_module("numba.extending")
    with _lock:
        while _overloads:
            _overloads.pop()()
        return declare(numba)


def helper(function: Function) -> Function:
    """Declare a step that kernels call; it is inlined into them and never cached by itself."""
    return cast(Function, Step(function, STEP))


def kernel(function: Function) -> Function:
    """Declare a function that Python calls, on any number of threads at once."""
    return cast(Function, Kernel(function))


def intrinsic(function: Callable[..., Any]) -> Any:
    """Declare a function that makes LLVM IR: of a typing context and types it makes a signature, and what generates."""
    return Intrinsic(function)


def overload(stub: Callable[..., Any], **options: Any) -> Callable[[Function], Function]:
    """Declare what chooses, by types, the compiled form of a function that Python cannot call."""

    def declare(function: Function) -> Function:
        _overloads.append(lambda: import_module("numba.extending").overload(stub, **options)(function))
        return function

    return declare
