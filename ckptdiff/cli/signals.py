"""Note signals that end the program, and see to it that it ends soon, whatever it is at."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from ckptdiff.cli.failures import Session, failure
from ckptdiff.files.hidden import remove_hidden
from ckptdiff.files.unfinished import going_on, left_open
from ckptdiff.interrupts import note_signal
from ckptdiff.report.text import safe

__all__ = ["ended_soon", "signals_noted"]

_GRACE = 0.5


@contextmanager
def signals_noted() -> Iterator[None]:
    """Note SIGINT, SIGTERM and SIGHUP in `ckptdiff.interrupts`; what the caller ignores or handles stays as it is."""
    note_signal(None)
    before = {}
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):
            before[signum] = signal.signal(signum, _note)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        note_signal(None)


def _note(signum: int, frame: FrameType | None) -> None:
    note_signal(signum)


@contextmanager
def ended_soon(grace: float = _GRACE) -> Iterator[None]:
    """End the process if this lasts longer than `grace` seconds after a signal that is noted, or at a second one."""
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    # Written to at once, also while one long call keeps this thread from running handlers.
    before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(ear, grace), name="ckptdiff-signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(mouth)
        watcher.join()  # for ever, if it is ending the process
        os.close(ear)


def _watch(ear: int, grace: float) -> None:
    first = None
    while select.select([ear], [], [], None if first is None else grace)[0]:
        heard = os.read(ear, 1)
        if not heard:
            return
        if signal.getsignal(heard[0]) is _note:
            if first is not None:
                break
            first = heard[0]
    remove_hidden()
    code, message = failure(KeyboardInterrupt(first), Session())
    message = "\n".join([*(f"ckptdiff: warning: {safe(going_on(folder))}" for folder in left_open()), message])
    with suppress(OSError):
        # Past sys.stderr, which the main thread may hold, and not at all if nobody reads.
        if sys.stderr is not None and select.select([], [2], [], 0)[1]:
            shown = b"\x1b[?25h\n" if os.isatty(2) else b""  # the cursor, which the progress display may have hidden
            os.write(2, shown + f"{message}\n".encode())
    os._exit(code)
