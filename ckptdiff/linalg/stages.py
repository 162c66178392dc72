"""Share the passes over a pair of matrices, a sequence of panels, among several computations.

Every matrix is seen tall: ``long`` by ``short``. A stored matrix that is wide comes transposed, which changes neither
its singular values nor any figure that counts entries; left and right singular vectors trade places.

A source may hold a stack of pairs of one shape: then every array has an axis more in front, each call computes all of
them, and a stage gives a list. A stack has a fixed size, so that no digit of a pair depends on which others are in it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np

from ckptdiff.linalg.library import Array, Library, library_of
from ckptdiff.linalg.threads import in_background

Side: TypeAlias = Literal["base", "delta", "tuned"]

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Panel:
    """Consecutive rows of a tall pair, or of each pair of a stack."""

    base: Array
    delta: Array
    """W0 and d = W1 - W0: C-contiguous float32 or float64 of shape (rows, short), or with an axis more in front,
    overwritten by the next panel."""

    def side(self, name: Side) -> Array:
        """W0, d, or W1 = W0 + d."""
        return self.base + self.delta if name == "tuned" else self.base if name == "base" else self.delta


class PanelSource(Protocol):
    """A pair of matrices that can be read as often as needed."""

    long: int
    short: int
    dtype: np.dtype[Any]
    """Of the panels: float32 or float64."""
    library: Library
    """Of the arrays of the panels."""
    kept: bool
    """Whether a pass reads nothing, since all is in memory."""
    stack: tuple[int, ...]
    """How many pairs there is room for, if it is a stack, else nothing; those without a pair hold zeros."""

    def panels(self) -> Iterator[Panel]:
        """All rows, in order."""

    def sample(self, count: int) -> Array:
        """About `count` rows of W0, evenly spaced."""


@dataclass(frozen=True, slots=True)
class Meanwhile:
    """Work of a stage between two of its passes, during which other stages may go on with theirs."""

    work: Callable[[], None]


Stage: TypeAlias = Generator[Callable[[Panel], None] | Meanwhile, None, Result]
"""A computation in passes: it yields what to do with each panel of a pass, and goes on when the pass is over."""


def meanwhile(work: Callable[[], Result]) -> Stage[Result]:
    """Part of a stage: work of its own, during which other stages may go on."""
    found: list[Result] = []
    yield Meanwhile(lambda: found.append(work()))
    return found[0]


def run_together(source: PanelSource, *stages: Stage[Any]) -> list[Any]:
    """Run computations side by side, each pass over the pair read once for all, and return what they returned."""
    results: list[Any] = [None] * len(stages)
    live: dict[int, Callable[[Panel], None]] = {}
    busy: dict[int, Future[None]] = {}

    def advance(index: int) -> None:
        live.pop(index, None)
        try:
            step = next(stages[index])
        except StopIteration as end:
            results[index] = end.value
            return
        if isinstance(step, Meanwhile):
            busy[index] = in_background(step.work)
        else:
            live[index] = step

    for index in range(len(stages)):
        advance(index)
    while live or busy:
        for index, future in list(busy.items()):
            if future.done() or not live:
                del busy[index]
                future.result()
                advance(index)
        if live:
            for panel in source.panels():
                for visit in live.values():
                    visit(panel)
            for index in list(live):
                advance(index)
    return results


class ArrayPanels:
    """A pair in memory, handed out so many rows at a time.

    C-contiguous float arrays of shape (long, short), or (pairs, long, short) for a stack.
    """

    kept = True

    def __init__(self, base: Array, delta: Array, rows: int = 512, library: Library | None = None) -> None:
        if base.shape != delta.shape or base.shape[-2] < base.shape[-1]:
            raise ValueError(f"a tall pair of equal shapes is needed, not {base.shape} and {delta.shape}")
        self._base, self._delta, self._rows = base, delta, rows
        *stack, self.long, self.short = base.shape
        self.stack = tuple(stack)
        self.library = library or library_of(base)
        self.dtype = np.dtype(np.float32 if base.dtype == self.library.xp.float32 else np.float64)

    def panels(self) -> Iterator[Panel]:
        """All rows, in order."""
        for first in range(0, self.long, self._rows):
            rows = slice(first, min(first + self._rows, self.long))
            yield Panel(self._base[..., rows, :], self._delta[..., rows, :])

    def sample(self, count: int) -> Array:
        """About `count` rows of W0, evenly spaced."""
        return self._base[..., :: max(1, self.long // count), :]
