"""Facts of the tensors of a pair that are known before any data is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

Side: TypeAlias = Literal["base", "tuned"]
SIDES: tuple[Side, Side] = ("base", "tuned")


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """Facts of a compared tensor that are known before its data is read.

    Examples
    --------
    >>> import ckptdiff
    >>> facts = ckptdiff.diff("fixtures/llama/base", "fixtures/llama/tuned").tensors[0]
    >>> facts.name, facts.compare
    ('model.embed_tokens.weight', 'bf16')
    """

    name: str
    shape: tuple[int, ...]
    dtype_base: str
    dtype_tuned: str
    compare: str
    """Dtype both sides were cast to ("bf16", "f32", ...), or "bitwise"."""
    layer: int | None
    tower: str
    module_type: str
    block: str
    tuned_name: str | None = None
    """Name on the tuned side, if it differs."""
    groups: tuple[str, ...] = ()
    """The user's own groups that the name matches."""
    same_bytes: bool = False
    """Both names resolve to the same bytes of the same file."""
    unread: bool = False
    """Both sides are known to be the same, and were not read: nothing changed, and what needs values is unknown."""
    pieces: tuple[PieceFacts, ...] = ()
    """Of what the tuned side is put together, if it is not one tensor of the same layout."""
    rows: RowCounts | None = None
    """If the sides do not have as many; `shape` is that of the base."""
    kept: KeptFacts | None = None
    """Of quantised weights, once they are measured."""
    untied: bool = False
    """One side is a head of its own, the other one's the embedding, which its head is tied to."""
    compared: tuple[int, int] | None = None
    """Values of the base and of the tuned side that the pair compares; None stands for all of `shape` on both."""

    @property
    def plain(self) -> bool:
        """Whether it is a whole stored tensor on either side, the base's under this name."""
        return not (self.pieces or self.rows or self.untied or self.kept)

    @property
    def numel(self) -> int:
        """Coordinates that are compared."""
        return math.prod(self.shape) if self.compared is None else max(self.compared)

    def compared_of(self, side: Side) -> int:
        """Values of a side that are compared."""
        return math.prod(self.shape) if self.compared is None else self.compared[SIDES.index(side)]


@dataclass(frozen=True, slots=True)
class PieceFacts:
    """A part of a compared tensor, and the part of a tensor of the tuned side that it is compared with.

    Indices hold start, stop and step of each axis.
    """

    tuned_name: str
    base_index: tuple[tuple[int, int, int], ...]
    tuned_index: tuple[tuple[int, int, int], ...]
    transposed: bool
    """Whether the last two axes of the tuned part are swapped."""


class KeptFacts(NamedTuple):
    """What both sides of a weight have in common besides values, where at least one is quantised.

    Shares; None where they are undefined.
    """

    codes_unchanged: float | None
    """Of the codes, where both sides have codes of one format."""
    scales_unchanged: float | None
    """Of the scales, as values, where the blocks of both sides are the same."""
    requantised: float | None
    """Of the values that differ, those that do by no more than the larger step of both grids there: such as rounding
    the same weight anew leaves."""


class RowCounts(NamedTuple):
    """Rows of a tensor that one side has more of than the other, such as an embedding of more tokens."""

    compared: int
    only_in_base: int
    only_in_tuned: int


@dataclass(frozen=True, slots=True)
class UnmatchedTensor:
    """A tensor of both sides that could not be compared."""

    name: str
    base: Mapping[str, Any]
    """``{"dtype", "shape"}`` of the base side."""
    tuned: Mapping[str, Any]
    reason: str
