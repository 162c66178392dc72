"""Have a process refuse kernels that it has not called before, with arguments of the same types.

Those are what it would have to compile: the types that `flatten` tells apart are those that Numba does.
"""

from __future__ import annotations

from typing import Any

from ckptdiff import jit
from ckptdiff.kernel_library import flatten

_call = jit.Kernel.__call__
_known: set[tuple[Any, ...]] = set()
_refusing = False


def _noted(kernel: jit.Kernel, *arguments: Any) -> Any:
    key: list[Any] = []
    flatten(arguments, key, [])
    call = (kernel.name, *key)
    if _refusing and call not in _known:
        raise RuntimeError(f"{kernel.name} was not called before with {key}")
    _known.add(call)
    return _call(kernel, *arguments)


def refuse_others() -> None:
    """From here on kernels are refused that no call was made of since this module was imported."""
    global _refusing
    _refusing = True


jit.Kernel.__call__ = _noted  # type: ignore[method-assign]
