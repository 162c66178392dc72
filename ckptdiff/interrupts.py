"""Note that a signal asked the process to end, and raise that where it can be raised safely.

The handlers of the command line only note it, since an exception between any two steps of Python would find locks taken
and threads half made; what runs or waits asks here. For a library user nothing is noted, and nothing is raised here.
"""

from __future__ import annotations

__all__ = ["note_signal", "pending", "raise_pending"]

_noted: int | None = None


def note_signal(signum: int | None) -> None:
    """Note a signal; None forgets it."""
    global _noted
    _noted = signum


def pending() -> KeyboardInterrupt | None:
    """An exception with the number of the signal, if one was noted."""
    return None if _noted is None else KeyboardInterrupt(_noted)


def raise_pending() -> None:
    """Raise :func:`pending`, if a signal was noted."""
    if _noted is not None:
        raise KeyboardInterrupt(_noted)  # kept in no variable, whose frame would keep alive all that it ends
