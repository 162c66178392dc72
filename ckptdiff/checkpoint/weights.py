"""Describe what a model multiplies with where that is not one stored tensor: decoded codes, pieces put together, parts.

All stand in the place of a :class:`~ckptdiff.checkpoint.header.TensorInfo` in a pair, and ``checkpoint/boxes.py`` reads
them.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TypeAlias

from ckptdiff.checkpoint.dtypes import DTYPES, Kind
from ckptdiff.checkpoint.header import TensorInfo

__all__ = [
    "Assembled",
    "CommonPart",
    "Decoded",
    "Piece",
    "Range",
    "Region",
    "Source",
    "Weight",
    "sources_of",
    "stored_as",
]

Range: TypeAlias = tuple[int, int, int]
"""Start, stop and step along an axis."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A quantised weight: codes with their scales.

    It is looked at as a matrix: the last axis of `shape` are the columns, all others together the rows. A value is
    ``(code - zero) * scale``, times or over a global scale.

    Attributes
    ----------
    name : str
        Of the weight, such as "X.weight", however its codes are called.
    encoding : str
        The format's name, such as "NVFP4".
    shape : tuple of int
        Of its values.
    codes : TensorInfo
        Each row begins with a byte of its own.
    parts : tuple of TensorInfo
        All stored tensors that it is made of, the codes among them.
    code : str
        What a code is: "e4m3", "e5m2", "e2m1" (two to a byte, the low nibble first), or "int1" to "int8".
    scales : TensorInfo
        One for each block, row by row. U8 and F8_E8M0 are powers of two, 2^(byte - 127).
    block : tuple of (int, int)
        Rows and columns that share a scale. Blocks begin anew with each matrix of the last two axes, unless one block
        is more than a matrix; at its edges they are cut.
    zeros : TensorInfo or None
        Of integer codes: I8, one for each scale, or I32, packed as the codes are, but along the rows.
    global_scale : TensorInfo or None
        F32: one, or one for each matrix.
    divides : bool
        Whether values are over the global scale, not times it.
    dtype : str
        What its values come as.
    """

    name: str
    encoding: str
    shape: tuple[int, ...]
    codes: TensorInfo
    parts: tuple[TensorInfo, ...]
    code: str
    scales: TensorInfo
    block: tuple[int, int]
    zeros: TensorInfo | None = None
    global_scale: TensorInfo | None = None
    divides: bool = False
    dtype: str = "F32"

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes stored, of all parts."""
        return sum(part.nbytes for part in self.parts)

    @property
    def kind(self) -> Kind:
        """What can be measured on its values."""
        return DTYPES[self.dtype].kind

    @property
    def rows(self) -> int:
        """Rows of the whole."""
        return math.prod(self.shape[:-1])

    @property
    def period(self) -> int:
        """Rows after which blocks begin anew."""
        height = self.shape[-2] if len(self.shape) > 1 else 1
        return self.rows if self.block[0] > height else height


Source: TypeAlias = TensorInfo | Decoded
"""What pieces are taken from."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor of the base, and the box of a tensor of the tuned side that holds the same weights.

    Attributes
    ----------
    source : TensorInfo or Decoded
        Of the tuned side.
    base_index, tuned_index : tuple of Range
        A range for each axis of the two tensors. Without axes of one entry both boxes have the same shape.
    transposed : bool
        Once the last two axes of the tuned box are swapped.
    """

    source: Source
    base_index: tuple[Range, ...]
    tuned_index: tuple[Range, ...]
    transposed: bool = False

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(len(range(*axis)) for axis in self.tuned_index)


@dataclass(frozen=True, slots=True, eq=False)
class Assembled:
    """Pieces that together are one tensor of the base, or as much of it as the tuned side has.

    There may be thousands: each is equal to itself alone.

    Attributes
    ----------
    name : str
        Of the tuned side: its tensor, if all pieces are of one, else a pattern with ``*`` for what differs.
    dtype : str
        Of all pieces.
    shape : tuple of int
        Of the base's tensor.
    pieces : tuple of Piece
        No element of that tensor is in two.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def whole(self) -> bool:
        """Whether each element is in a piece."""
        return self.region.numel == self.numel

    @property
    def region(self) -> Region:
        """What is in pieces."""
        boxes = tuple(piece.base_index for piece in self.pieces)
        return Region(self.shape, boxes, sum(piece.numel for piece in self.pieces))

    @property
    def taken(self) -> Counter[str]:
        """How many values it takes of each weight of its own side, by name."""
        found: Counter[str] = Counter()
        for piece in self.pieces:
            found[piece.source.name] += piece.numel
        return found

    @property
    def nbytes(self) -> int:
        """Bytes that its elements take where they are stored."""
        return self.numel * DTYPES[self.dtype].bits // 8

    @property
    def kind(self) -> Kind:
        """What can be measured on its values."""
        return DTYPES[self.dtype].kind


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """The elements of a tensor that lie in some boxes of it, in the order of the tensor; ``checkpoint/region.py``.

    Attributes
    ----------
    shape : tuple of int
        Of the tensor, which is not empty.
    boxes : tuple of tuple of Range
        A range for each axis. No two boxes have an element in common.
    numel : int
        Number of elements in it.
    """

    shape: tuple[int, ...]
    boxes: tuple[tuple[Range, ...], ...]
    numel: int


@dataclass(frozen=True, slots=True, eq=False)
class CommonPart:
    """Those elements of a side that the other one has too, one after the other in the order of the base's tensor.

    Attributes
    ----------
    whole : TensorInfo, Decoded or Assembled
        In the shape of the base's tensor.
    region : Region
        Which of its elements.
    """

    whole: Source | Assembled
    region: Region

    @property
    def name(self) -> str:
        """That of the whole."""
        return self.whole.name

    @property
    def dtype(self) -> str:
        """That of the whole."""
        return self.whole.dtype

    @property
    def kind(self) -> Kind:
        """What can be measured on its values."""
        return self.whole.kind

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.region.numel

    @property
    def shape(self) -> tuple[int, ...]:
        """A list: what is left of a tensor has the axes of none."""
        return (self.numel,)

    @property
    def nbytes(self) -> int:
        """Its share of the bytes of the whole."""
        return self.whole.nbytes * self.numel // self.whole.numel


Weight: TypeAlias = TensorInfo | Decoded | Assembled | CommonPart
"""A side of a pair."""


def sources_of(weight: Weight) -> tuple[Source, ...]:
    """The weights of its own side that a side of a pair is made of."""
    if isinstance(weight, CommonPart):
        return sources_of(weight.whole)
    return tuple(dict.fromkeys(piece.source for piece in weight.pieces)) if isinstance(weight, Assembled) else (weight,)


def stored_as(weight: Weight) -> str:
    """What a side is stored as: its dtype, or the name of its encoding."""
    if isinstance(weight, TensorInfo):
        return weight.dtype
    return "/".join(
        dict.fromkeys(source.encoding if isinstance(source, Decoded) else source.dtype for source in sources_of(weight))
    )
