"""Hold what pairing finds: each tensor of two checkpoints in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, TypeAlias

from ckptdiff.checkpoint.header import TensorInfo
from ckptdiff.checkpoint.suggested_map import SuggestedMap
from ckptdiff.checkpoint.ties import Evidence
from ckptdiff.checkpoint.weights import Assembled, CommonPart, Decoded, Piece, Source, Weight

__all__ = ["Alias", "CommonRows", "Mismatch", "Orders", "Pairing", "TensorPair", "first_rows"]

Orders: TypeAlias = tuple[tuple[str, Assembled], ...]
"""What may be said of gate and up against their layout, and what a tensor of the base would be made of then."""


class CommonRows(NamedTuple):
    """Rows of a pair whose sides do not have as many."""

    compared: int
    only_in_base: int
    only_in_tuned: int


@dataclass(frozen=True, slots=True)
class TensorPair:
    """Two tensors to compare.

    Attributes
    ----------
    name : str
        The base's name, by which every report calls the pair.
    base, tuned : Weight
        The two sides: equal shapes; both `FLOAT`, or the same dtype.
    rows : CommonRows, optional
        Where one side has more rows than the other, as of a vocabulary that has grown: the sides are those in common.
        Where the tuned side lacks pieces of the base's tensor, both sides are a `CommonPart`.
    untied : bool
        Whether one side is an embedding, which the other side's head of that name has left.
    """

    name: str
    base: Weight
    tuned: Weight
    rows: CommonRows | None = None
    untied: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the base's tensor, all of it, which is the shape of masks."""
        rows = self.rows
        if isinstance(self.base, CommonPart):
            return self.base.whole.shape
        return self.base.shape if rows is None else (rows.compared + rows.only_in_base, *self.base.shape[1:])

    @property
    def stored(self) -> bool:
        """Whether it is two whole stored tensors, the base's under the pair's name."""
        whole = isinstance(self.base, TensorInfo) and isinstance(self.tuned, TensorInfo) and self.rows is None
        return whole and not self.untied

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What the tuned side is put together of, if it is."""
        tuned = self.tuned.whole if isinstance(self.tuned, CommonPart) else self.tuned
        return tuned.pieces if isinstance(tuned, Assembled) else ()

    @property
    def tuned_name(self) -> str | None:
        """The tuned side's name, or None where it is the base's."""
        return None if self.tuned.name == self.name else self.tuned.name

    @property
    def same_bytes(self) -> bool:
        """Whether both sides are the same bytes, of one file or of two of equal hash, so that they are read once."""
        base, tuned = self.base, self.tuned
        return isinstance(base, TensorInfo) and isinstance(tuned, TensorInfo) and _same_place(base, tuned)

    @property
    def known_equal(self) -> bool:
        """Whether both sides are known to hold the same before a byte of them is read, quantised ones too."""
        base, tuned = self.base, self.tuned
        if not (isinstance(base, Decoded) and isinstance(tuned, Decoded)):
            return self.same_bytes
        known = ("encoding", "shape", "code", "block", "divides")
        return all(getattr(base, name) == getattr(tuned, name) for name in known) and all(
            _same_place(getattr(base, name), getattr(tuned, name))
            for name in ("codes", "scales", "zeros", "global_scale")
        )


@dataclass(frozen=True, slots=True)
class Alias:
    """A tensor that is another one under a second name, and so is counted once.

    Attributes
    ----------
    name : str
        The tensor that is not compared on its own.
    of : str
        The tensor that stands for it, in the same checkpoint.
    side : {"base", "tuned"}
        Which checkpoint stores it under that name.
    by : {"values", "config"}
        How that is known: a look at all values, or ``config.json``, which may be wrong.
    """

    name: str
    of: str
    side: Literal["base", "tuned"]
    by: Evidence


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Two tensors that belong together and cannot be compared.

    Attributes
    ----------
    name : str
        The base's name.
    base, tuned : Source
        The two sides.
    reason : str
        Why not, in words.
    """

    name: str
    base: Source
    tuned: Source
    reason: str


@dataclass(frozen=True, slots=True)
class Pairing:
    """Every tensor of two checkpoints, each in one place.

    Attributes
    ----------
    pairs : tuple of TensorPair
        What is compared, in the order of the base's files.
    only_in_base, only_in_tuned : tuple of str
        Names without a counterpart, in their own checkpoint's order.
    aliased : tuple of Alias
        Names that stand for another tensor.
    mismatched : tuple of Mismatch
        Counterparts that cannot be compared.
    warnings : tuple of str
        What the user should know about the pairing.
    suggested : SuggestedMap
        Rules for ``--map`` that would pair more.
    weights : pair of mapping of str to Source
        All weights of both sides, by name.
    excluded : pair of mapping of str to int
        How many values of each weight of both sides the user's globs leave out.
    orders : mapping of str to Orders
        By base name, one tensor for each layout with a gate and what it gates.
    """

    pairs: tuple[TensorPair, ...]
    only_in_base: tuple[str, ...]
    only_in_tuned: tuple[str, ...]
    aliased: tuple[Alias, ...]
    mismatched: tuple[Mismatch, ...]
    warnings: tuple[str, ...]
    weights: tuple[Mapping[str, Source], Mapping[str, Source]]
    suggested: SuggestedMap = field(default_factory=SuggestedMap)
    excluded: tuple[Mapping[str, int], Mapping[str, int]] = field(default_factory=lambda: ({}, {}))
    orders: Mapping[str, Orders] = field(default_factory=dict)


def _same_place(base: TensorInfo | None, tuned: TensorInfo | None) -> bool:
    if base is None or tuned is None:
        return base is tuned
    # As a rule there are two files, which is seen at once where no hash of their content is known.
    if base.shard.inode != tuned.shard.inode and not base.shard.content:
        return False
    return base.region == tuned.region


def first_rows(weight: Source, rows: int) -> Source:
    """The first rows of a weight, as one of their own."""
    if isinstance(weight, Decoded):
        # Its scales are found by the rows that they are of.
        codes = _first_rows(weight.codes, rows)
        parts = tuple(codes if part == weight.codes else part for part in weight.parts)
        return replace(weight, shape=(rows, *weight.shape[1:]), codes=codes, parts=parts)
    return _first_rows(weight, rows)


def _first_rows(tensor: TensorInfo, rows: int) -> TensorInfo:
    shape = (rows, *tensor.shape[1:])
    if tensor.slices:
        within = (one for one in tensor.slices if one.offsets[0] < rows)
        cut = (replace(one, sizes=(min(one.sizes[0], rows - one.offsets[0]), *one.sizes[1:])) for one in within)
        return replace(tensor, shape=shape, slices=tuple(cut))
    size = tensor.nbytes // tensor.shape[0]
    return replace(tensor, shape=shape, stop=tensor.start + rows * size)
