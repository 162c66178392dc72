"""Carry what the commands and main() tell each other."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Session", "Terminated"]


@dataclass(slots=True)
class Session:
    """State of one command line.

    Attributes
    ----------
    traceback : bool
        Show the traceback of an unexpected error (``-v`` or CKPTDIFF_DEBUG=1).
    """

    traceback: bool = False


class Terminated(BaseException):
    """A signal asked the process to end; raised where the program stands, so that temporary files go away.

    Parameters
    ----------
    signum : int
        The signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
