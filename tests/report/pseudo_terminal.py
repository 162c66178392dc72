"""A command under a real pseudo-terminal, whose screen can be read while it runs."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyte
from patience import PATIENCE

__all__ = ["Terminal", "lines_of", "run_under_terminal"]

# The terminal becomes that of the session, so that Ctrl-C typed there is a signal here. What only a run that lasts
# would show is shown at once, and each event is drawn. Where a stage counts, it must have counted everything.
_START = """
import os, sys
os.close(os.open(os.ttyname(2), os.O_RDWR))
from functools import partial
from ckptdiff import events, in_order
from ckptdiff.report import progress
end = events.Stage.end
def end_of_all(stage):
    counted, total = stage._last.done, stage._total
    assert stage._name == "writing" or abs(counted - total) <= 1e-6 * total, (stage._name, counted, total)
    end(stage)
events.Stage.end = end_of_all
events.Stage = partial(events.Stage, often=0.0)
progress.ProgressDisplay = partial(progress.ProgressDisplay, first_bar=0.0, per_second=float("inf"))
in_order.in_order = partial(in_order.in_order, patience=0.01)
"""


class Terminal:
    """A screen and the process that writes to it.

    Attributes
    ----------
    frames : list of list of str
        What was on the screen after each drawing, without empty lines at its end.
    screen : pyte.Screen
    written : bytes
        All that the process wrote.
    """

    def __init__(self, process: subprocess.Popen[bytes], master: int, columns: int, lines: int) -> None:
        self.frames: list[list[str]] = [[]]
        self.screen = pyte.Screen(columns, lines)
        self.written = b""
        self._stream = pyte.ByteStream(self.screen)
        self._process, self._master = process, master

    def wait_for(self, condition: Callable[[list[str]], bool]) -> None:
        """Read until the screen shows what is waited for."""
        deadline = time.monotonic() + PATIENCE
        while not condition(lines_of(self.screen)):
            assert time.monotonic() < deadline, lines_of(self.screen)
            assert self._read(), ("the command has ended", lines_of(self.screen))

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._master, text.encode())

    def ended(self) -> int:
        """Read to the end, and return the exit code."""
        deadline = time.monotonic() + PATIENCE
        while self._read():
            assert time.monotonic() < deadline, lines_of(self.screen)
        return self._process.wait(PATIENCE)

    def _read(self) -> bool:
        if not select.select([self._master], [], [], 1.0)[0]:
            return True
        try:
            piece = os.read(self._master, 1 << 16)
        except OSError as error:
            if error.errno != errno.EIO:  # Linux's way to say that nobody has it open any more
                raise
            return False
        self.written += piece
        # Several drawings may come at once; each begins by erasing the one before.
        for part in re.split(rb"(?=\r\x1b\[2K)", piece):
            self._stream.feed(part)
            self.frames.append(lines_of(self.screen))
        return bool(piece)


def lines_of(screen: pyte.Screen) -> list[str]:
    """What a screen shows, line by line, without empty lines at its end."""
    lines = [line.rstrip() for line in screen.display]
    while lines and not lines[-1]:
        lines.pop()
    return lines


@contextmanager
def run_under_terminal(code: str, columns: int, lines: int, **environment: str) -> Iterator[Terminal]:
    """Run Python code with the terminal as its stdin and stderr; its stdout is a pipe that must stay empty."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", _START + code],
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=slave,
        start_new_session=True,
        env={**kept, "TERM": "xterm-256color", **environment},
    )
    os.close(slave)
    try:
        yield Terminal(process, master, columns, lines)
        assert process.stdout is not None
        assert process.stdout.read() == b""
    finally:
        process.kill()
        process.communicate()
        os.close(master)
