"""Settings that only a process of ckptdiff's own may have: a command, not a program that imports the library."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from contextlib import suppress
from typing import NoReturn

__all__ = ["leave", "take_over"]

_COLLECT_AFTER = 1_000_000
"""Objects made before Python looks for unused ones; by default 700."""
_TURN = 0.0005
"""Seconds; by default 0.005."""


class _NoBlas:
    """Lets Numba find no BLAS, which no kernel calls.

    It looks for one by importing all of scipy.linalg, a tenth of a second of every command where SciPy is installed.
    """

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in ("scipy", "scipy.linalg"):
            looking = sys.modules.get("numba.np.arraymath")
            if looking is not None and getattr(looking.__spec__, "_initializing", False):
                raise ModuleNotFoundError("Numba is kept from looking for BLAS", name=name)


def take_over() -> None:
    """Make the process ckptdiff's own."""
    # What a plan of many tensors is made of lives to the end, and Python would look at all of it again and again for
    # cycles that are not there.
    gc.set_threshold(_COLLECT_AFTER)
    # A thread that comes back from compiled code waits for its turn at most this long, which is not often.
    sys.setswitchinterval(_TURN)
    sys.meta_path.insert(0, _NoBlas())


def leave(code: int) -> NoReturn:
    """End the process with an exit code, after what is registered for its end, and with its streams written out.

    Python would take apart every module first, and look twice for cycles: a third of a second over what the system
    frees at once. Nothing else is left out: files are complete, threads joined, before a command returns its code. A
    debugger or profiler, which has yet to tell what it saw, and ``python -i`` get the usual end.
    """
    tools = getattr(sys, "monitoring", None)  # Python 3.12: where profilers are
    watched = sys.gettrace() or sys.getprofile() or (tools is not None and any(map(tools.get_tool, range(6))))
    if watched or sys.flags.interactive or sys.flags.inspect:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or none; a command has flushed its output before
            stream.flush()
    os._exit(code)
