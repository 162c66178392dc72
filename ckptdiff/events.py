"""Tell what a command does while it runs; a progress display or a library user listens, and it knows no screen.

A command goes through stages, one after the other: it compiles, compares, measures spectra, writes. Each begins with
a :class:`StageBegun` before anything of it is done, goes on with :class:`StageProgress` whose ``done`` never falls, and
is over with the one whose ``done`` is the total. Only a stage that an exception ended has no such end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from ckptdiff.interrupts import raise_pending

if TYPE_CHECKING:
    from ckptdiff.figures.result import Diff

__all__ = [
    "Event",
    "Finished",
    "Listener",
    "Note",
    "Stage",
    "StageBegun",
    "StageProgress",
    "Started",
    "TensorsDone",
    "Unit",
    "ignore",
    "stage",
]

Unit: TypeAlias = Literal["bytes", "kernels", "share"]
"""What a stage counts; of "share" only the part of the total means something."""


@dataclass(frozen=True, slots=True)
class StageBegun:
    """A stage begins; what comes before the next such event is of this stage."""

    stage: str
    """What is done, in a word or two: "comparing", "spectra", "writing"."""
    total: float
    unit: Unit
    kept: float = 0
    """Of the total, what an earlier command has done and kept; it is told as done soon."""


@dataclass(frozen=True, slots=True)
class StageProgress:
    """More of a stage is done, or time went by: told some times a second, also while nothing ends."""

    stage: str
    done: float
    """Of the total."""
    what: str = ""
    """What is at hand: a tensor, as a rule."""
    compared: int = 0
    """Coordinates of floating tensors that were compared so far; 0 in other stages than the comparison."""
    unchanged: int = 0
    """Of those, equal after the cast."""


@dataclass(frozen=True, slots=True)
class Started:
    """The plan is made, and what is compared comes next."""

    tensors: int
    total_bytes: int
    """Bytes to read, both sides."""
    diff: Diff
    """The result so far: every fact that needs no data, with columns of length zero."""


@dataclass(frozen=True, slots=True)
class TensorsDone:
    """These tensors and all before them in plan order are done."""

    first: int
    diff: Diff
    """A result that holds these tensors alone: facts and columns of length one or more."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something the user may want to know; shown with ``-v``, or always if ``warning``."""

    text: str
    warning: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """The run is complete and the run file, if any, is in place."""

    diff: Diff
    seconds: float


Event: TypeAlias = StageBegun | StageProgress | Started | TensorsDone | Note | Finished
Listener: TypeAlias = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listen to nothing."""


class Stage:
    """Tells of one stage; between two events lie `often` seconds at least: many small tensors take less.

    A signal that was noted is raised by :meth:`at`.
    """

    def __init__(
        self,
        tell: Listener,
        name: str,
        total: float = 1,
        unit: Unit = "share",
        often: float = 0.05,
        kept: float = 0,
    ) -> None:
        self._tell, self._name, self._total, self._often = tell, name, total, often
        self._last = StageProgress(name, 0)
        self._told = time.monotonic()
        tell(StageBegun(name, total, unit, kept))

    def at(self, done: float, what: str = "", compared: int = 0, unchanged: int = 0) -> None:
        """Say how far the stage is, unless that was said just now; for the end there is :meth:`end`."""
        raise_pending()
        now = time.monotonic()
        done = max(done, self._last.done)
        self._last = StageProgress(self._name, done, what, compared, unchanged)
        if now - self._told >= self._often and done < self._total:
            self._told = now
            self._tell(self._last)

    def more(self, amount: float, what: str = "") -> None:
        """Say that so much more is done."""
        self.at(self._last.done + amount, what)

    def again(self, done: float = 0) -> None:
        """Say the same again, while nothing ends, or that more is done of it."""
        last = self._last
        self.at(done, last.what, last.compared, last.unchanged)

    def end(self) -> None:
        """Say that everything is done."""
        last = self._last
        self._tell(StageProgress(self._name, self._total, last.what, last.compared, last.unchanged))


@contextmanager
def stage(tell: Listener | None, name: str, total: float = 1, unit: Unit = "share", kept: float = 0) -> Iterator[Stage]:
    """Tell of a stage from its first moment to its end, unless an exception ends it."""
    told = Stage(tell or ignore, name, total, unit, kept=kept)
    yield told
    told.end()
