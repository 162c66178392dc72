"""Count how far tasks are that run elsewhere: nodes tell, and whoever waits for the tasks asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable


class Tally:
    """What is done of each task, by its number."""

    def __init__(self) -> None:
        self._done: dict[int, float] = {}

    def tell(self, number: int, done: float) -> None:
        """Note how much of a task is done."""
        self._done[number] = done

    def of(self, numbers: Iterable[int]) -> float:
        """What is done of some tasks; all others are over, and are forgotten."""
        self._done = {number: self._done[number] for number in numbers if number in self._done}
        return sum(self._done.values())


def seldom(tell: Callable[[float], object], seconds: float = 0.5) -> Callable[[float], None]:
    """Have something told at most once in so many seconds."""
    last = time.monotonic()

    def told(done: float) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            tell(done)

    return told
