"""Count how far tasks are that run elsewhere, and where: nodes tell, and whoever waits for the tasks asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable


class Tally:
    """What is done of each task, by its number, and on which nodes."""

    def __init__(self) -> None:
        self._done: dict[int, float] = {}
        self._nodes: dict[int, list[str]] = {}

    def tell(self, number: int, done: float, node: str) -> None:
        """Note how much of a task is done, by a node of this ID."""
        self._done[number] = done
        nodes = self._nodes.setdefault(number, [])
        if node not in nodes:
            nodes.append(node)

    def of(self, numbers: Iterable[int]) -> float:
        """What is done of some tasks; all others are over, and are forgotten."""
        self._done = {number: self._done[number] for number in numbers if number in self._done}
        self._nodes = {number: self._nodes[number] for number in self._done}
        return sum(self._done.values())

    def nodes(self, number: int) -> list[str]:
        """IDs of the nodes that have begun a task."""
        return self._nodes.get(number, [])


def seldom(tell: Callable[[float], object], seconds: float = 0.5) -> Callable[[float], None]:
    """Have something told at most once in so many seconds."""
    last = time.monotonic()

    def told(done: float) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            tell(done)

    return told
