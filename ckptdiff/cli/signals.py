"""Turn signals that end the program into exceptions where it stands, so that temporary files go away.

Inside the standard library's code for threads and processes they wait a moment: an exception there would leave a lock
closed, for which someone then waits for ever, or a thread that nobody waits for.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from ckptdiff.cli.session import Terminated

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

__all__ = ["pending", "raise_pending", "signals_raise"]

_GRACE = 10.0
"""Seconds after a signal in which others are ignored: they would cut the cleaning up short."""

_LATER = 0.001
"""Seconds after which a signal that came at a bad moment is sent again."""
_BAD_MOMENTS = {
    ("subprocess", "Popen._internal_poll"),
    ("threading", "Condition.__enter__"),
    ("threading", "Condition.__exit__"),
    ("threading", "Thread.start"),
    ("concurrent.futures.thread", "ThreadPoolExecutor.submit"),
}
"""Functions, as module and name, that must not end early; none of them waits for long."""

_received: tuple[int, float] | None = None
"""The last signal that was raised, and when."""


@contextmanager
def signals_raise() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into :class:`Terminated`, and SIGINT into KeyboardInterrupt.

    What the caller ignores, as nohup does, or handles in a way of its own stays as it is.
    """
    global _received
    _received = None
    tell = sys.unraisablehook

    def tell_of_others(dropped: UnraisableHookArgs) -> None:
        # Nobody is to read a traceback of a signal: it is raised again soon, see `pending`.
        if _received is None or not isinstance(dropped.exc_value, KeyboardInterrupt | Terminated):
            tell(dropped)

    sys.unraisablehook = tell_of_others
    before = {}
    usual = {signal.SIG_DFL, signal.default_int_handler}
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) in usual:
            before[signum] = signal.signal(signum, _receive)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        sys.unraisablehook = tell
        _received = None


def pending() -> BaseException | None:
    """The exception of the last signal, which may have been lost, or None if there was no signal.

    Python drops an exception that a signal raises inside a callback from C, of which the compiler makes many, and HDF5
    may put an error of its own in its place.
    """
    return None if _received is None else _exception(_received[0])


def raise_pending() -> None:
    """Raise a signal again that was lost.

    Raises
    ------
    KeyboardInterrupt, Terminated
        If a signal was received before.
    """
    if (lost := pending()) is not None:
        raise lost


def _receive(signum: int, frame: FrameType | None) -> None:
    global _received
    now = time.monotonic()
    if _received is not None and now - _received[1] <= _GRACE:
        return
    if _bad_moment(frame):
        # Not a threading.Thread: the code that makes one may be what was interrupted.
        _thread.start_new_thread(_send_later, (signum,))
        return
    _received = signum, now
    raise _exception(signum)


def _send_later(signum: int) -> None:
    time.sleep(_LATER)
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signum)


def _bad_moment(frame: FrameType | None) -> bool:
    while frame is not None:
        if (frame.f_globals.get("__name__"), frame.f_code.co_qualname) in _BAD_MOMENTS:
            return True
        frame = frame.f_back
    return False


def _exception(signum: int) -> BaseException:
    return KeyboardInterrupt() if signum == signal.SIGINT else Terminated(signum)
