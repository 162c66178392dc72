"""What the engine tells while it runs. It knows no screen; a progress display or a library user listens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from ckptdiff.result import Diff

__all__ = [
    "Compiling",
    "Event",
    "Finished",
    "Listener",
    "Note",
    "Progress",
    "StageProgress",
    "Started",
    "TensorsDone",
    "ignore",
]


@dataclass(frozen=True, slots=True)
class Compiling:
    """Kernels that are missing are compiled, before the plan is made."""

    kept: bool
    """Whether later runs find them."""


@dataclass(frozen=True, slots=True)
class Started:
    """The plan is made and the first read comes next."""

    tensors: int
    total_bytes: int
    """Bytes to read, both sides."""
    diff: Diff
    """The result so far: every fact that needs no data, with columns of length zero."""


@dataclass(frozen=True, slots=True)
class Progress:
    """More data went through."""

    bytes_done: int
    tensor: str
    compared: int
    """Coordinates compared so far, floating tensors only."""
    unchanged: int
    """Of those, equal after the cast."""


@dataclass(frozen=True, slots=True)
class TensorsDone:
    """These tensors and all before them in plan order are done."""

    first: int
    diff: Diff
    """A result that holds these tensors alone: facts and columns of length one or more."""


@dataclass(frozen=True, slots=True)
class StageProgress:
    """A stage other than the comparison (spectra, factors of an adapter, steps of a run) is done with a tensor."""

    stage: str
    """What was made, in the plural."""
    index: int
    """Of the tensor; all before it are done too."""
    tensors: int
    tensor: str
    outcome: str = ""
    """What became of it, in words; shown with ``-v``."""


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


Event: TypeAlias = Compiling | Started | Progress | TensorsDone | StageProgress | Note | Finished
Listener: TypeAlias = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listen to nothing."""
