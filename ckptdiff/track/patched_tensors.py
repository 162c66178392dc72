"""Say which tensors of a chain of checkpoints are read together, so that each is read once to be followed and patched.

A patch pairs tensors by name, dtype and shape, and takes every one. What is followed is paired as models name it: a
step may call it otherwise, or store it in another dtype, and its sides are read at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ckptdiff.checkpoint import Checkpoint, TensorInfo
from ckptdiff.patch.coded_block import Coding
from ckptdiff.patch.comparing import codes_in, partner_of
from ckptdiff.track.plan import TrackPlan

__all__ = ["Chained", "chained"]

Taken: TypeAlias = Literal["not", "whole", "steps"]
"""What the patch into a checkpoint takes of a tensor: nothing, the whole of it, or its steps from the side before."""


@dataclass(frozen=True, slots=True)
class Chained:
    """A tensor through the checkpoints that are read with it."""

    sides: tuple[TensorInfo | None, ...]
    """Of the base and of every step; None where nothing is read."""
    taken: tuple[Taken, ...]
    followed: int | None
    """Its number among the tensors that are followed."""

    @property
    def codes(self) -> int:
        """Codes of each side."""
        return max(codes_in(side) for side in self.sides if side is not None)

    @property
    def width(self) -> int:
        """Bytes of the widest code."""
        return max(Coding.of(side.dtype).width for side in self.sides if side is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all sides."""
        return sum(side.nbytes for side in self.sides if side is not None)


def chained(plan: TrackPlan, orders: Sequence[Sequence[str]]) -> list[Chained]:
    """Tensors of a base and its steps, each side of which some patch takes once.

    Parameters
    ----------
    orders : sequence of sequence of str
        Names of each step in the order of the patch into it, which is kept as far as the steps agree.
    """
    checkpoints = (plan.base, *plan.steps)
    owner: dict[tuple[int, str], int] = {}
    found: list[Chained] = []
    # Those of one name first: they leave nothing over.
    numbers = sorted(range(len(plan.tensors)), key=lambda number: len({one.name for one in plan.tensors[number].sides}))
    for number in numbers:
        sides = plan.tensors[number].sides
        taken = [_taken(checkpoints, owner, side, one, sides[side - 1]) for side, one in enumerate(sides)]
        owner |= {(side, sides[side].name): len(found) for side, how in enumerate(taken) if how != "not"}
        found.append(Chained(sides, tuple(taken), number))
    for first, names in enumerate(orders, 1):
        for name in names:
            if (first, name) not in owner:
                one = _rest(checkpoints, owner, first, name)
                owner |= {(side, name): len(found) for side, how in enumerate(one.taken) if how != "not"}
                found.append(one)
    numbers_of = [[owner[side, name] for name in names] for side, names in enumerate(orders, 1)]
    return [found[number] for number in _merged(numbers_of, len(found))]


def _merged(orders: Sequence[Sequence[int]], count: int) -> list[int]:
    """Numbers below `count` in one order, which is that of each sequence as long as these agree."""
    begin = -1
    after: dict[int, int] = {begin: begin}
    for order in orders:
        last = begin
        for number in order:
            if number not in after:
                after[number], after[last] = after[last], number
            last = number
    merged, last = list[int](), after[begin]
    while last != begin:
        merged.append(last)
        last = after[last]
    return [*merged, *(number for number in range(count) if number not in after)]


def _taken(
    checkpoints: Sequence[Checkpoint], owner: dict[tuple[int, str], int], side: int, one: TensorInfo, before: TensorInfo
) -> Taken:
    """What a patch takes of a side of a tensor that is followed."""
    if side == 0 or (side, one.name) in owner or checkpoints[side].tensors.get(one.name) != one:
        return "not"
    partner = partner_of(checkpoints[side - 1], one)
    if partner is None:
        return "whole"
    return "steps" if partner == before else "not"


def _rest(checkpoints: Sequence[Checkpoint], owner: dict[tuple[int, str], int], first: int, name: str) -> Chained:
    """A tensor that is not followed, as far as its dtype and shape stay the same."""
    sides: list[TensorInfo | None] = [None] * len(checkpoints)
    taken: list[Taken] = ["not"] * len(checkpoints)
    sides[first] = checkpoints[first].tensors[name]
    sides[first - 1] = partner_of(checkpoints[first - 1], checkpoints[first].tensors[name])
    taken[first] = "whole" if sides[first - 1] is None else "steps"
    for side in range(first + 1, len(checkpoints)):
        one = checkpoints[side].tensors.get(name)
        if one is None or (side, name) in owner or partner_of(checkpoints[side - 1], one) is None:
            break
        sides[side], taken[side] = one, "steps"
    return Chained(tuple(sides), tuple(taken), None)
