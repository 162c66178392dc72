"""Describe what a model multiplies with where that is not one stored tensor: decoded codes, and pieces put together.

Both stand in the place of a :class:`~ckptdiff.checkpoint.header.TensorInfo` in a pair. ``checkpoint/boxes.py`` reads
all three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from ckptdiff.checkpoint.dtypes import DTYPES, Kind
from ckptdiff.checkpoint.header import TensorInfo

__all__ = ["Assembled", "Decoded", "Piece", "Range", "Source", "Weight", "sources_of", "stored_as"]

Range: TypeAlias = tuple[int, int, int]
"""Start, stop and step along an axis."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A quantised weight: codes with their scales.

    Attributes
    ----------
    name : str
        Of the weight, such as "X.weight", however its codes are called.
    encoding : str
        The format's name, such as "NVFP4".
    shape : tuple of int
        Of its values.
    codes : TensorInfo
    parts : tuple of TensorInfo
        All stored tensors that it is made of, the codes among them.
    dtype : str
        What its values come as.
    """

    name: str
    encoding: str
    shape: tuple[int, ...]
    codes: TensorInfo
    parts: tuple[TensorInfo, ...]
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


@dataclass(frozen=True, slots=True, eq=False)
class Assembled:
    """Pieces that together are one tensor of the base. There may be thousands: each is equal to itself alone.

    Attributes
    ----------
    name : str
        Of the tuned side: its tensor, if all pieces are of one, else a pattern with ``*`` for what differs.
    dtype : str
        Of all pieces.
    shape : tuple of int
        Of the base's tensor.
    pieces : tuple of Piece
        Each element of that tensor is in one.
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
    def nbytes(self) -> int:
        """Bytes that its elements take where they are stored."""
        return self.numel * DTYPES[self.dtype].bits // 8

    @property
    def kind(self) -> Kind:
        """What can be measured on its values."""
        return DTYPES[self.dtype].kind


Weight: TypeAlias = TensorInfo | Decoded | Assembled
"""A side of a pair."""


def sources_of(weight: Weight) -> tuple[Source, ...]:
    """The weights of its own side that a side of a pair is made of."""
    return tuple(dict.fromkeys(piece.source for piece in weight.pieces)) if isinstance(weight, Assembled) else (weight,)


def stored_as(weight: Weight) -> str:
    """What a side is stored as: its dtype, or the name of its encoding."""
    return "/".join(
        dict.fromkeys(source.encoding if isinstance(source, Decoded) else source.dtype for source in sources_of(weight))
    )
