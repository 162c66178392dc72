"""Put matrices that can be computed together into stacks, and what is found of them in order again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Protocol, TypeVar


class Placed(Protocol):
    """Something to do, with its place among all."""

    @property
    def place(self) -> int:
        """From 0."""


Job = TypeVar("Job", bound=Placed)
Result = TypeVar("Result")


def in_stacks(
    jobs: Iterable[Job],
    kind: Callable[[Job], Hashable],
    room: Callable[[Job], int],
    size: Callable[[Job], int],
    most: int,
) -> Iterator[tuple[Job, ...]]:
    """Yield each job alone, or with others of its kind.

    Parameters
    ----------
    kind, room : callable
        What jobs have in common that can be done together, and how many of them; 1 if a job is done alone.
    size, most : callable, int
        A stack that is not full yet is yielded once the jobs since its first are as large together: what is found of
        them has to wait.
    """
    waiting: dict[Hashable, tuple[int, list[Job]]] = {}
    passed = 0
    for job in jobs:
        while waiting and passed - next(iter(waiting.values()))[0] >= most:
            yield tuple(waiting.pop(next(iter(waiting)))[1])
        if room(job) == 1:
            yield (job,)
        else:
            key = kind(job)
            stack = waiting.setdefault(key, (passed, []))[1]
            stack.append(job)
            if len(stack) == room(job):
                yield tuple(waiting.pop(key)[1])
        passed += size(job)
    for _, stack in waiting.values():
        yield tuple(stack)


def in_turn(jobs: Iterable[Job], found: Iterator[tuple[int, Result]]) -> Iterator[tuple[Job, Result]]:
    """Yield each job with what was found of it, in order, as that comes with its place in any."""
    early: dict[int, Result] = {}
    for job in jobs:
        while job.place not in early:
            place, one = next(found)
            early[place] = one
        yield job, early.pop(job.place)
