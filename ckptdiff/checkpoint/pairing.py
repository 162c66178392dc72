"""Which tensor of one checkpoint is compared with which tensor of the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ckptdiff.checkpoint.header import TensorInfo

__all__ = ["Alias", "Mismatch", "Pairing", "TensorPair"]


@dataclass(frozen=True, slots=True)
class TensorPair:
    """Two tensors to compare.

    Attributes
    ----------
    name : str
        The base's name, by which every report calls the pair.
    base, tuned : TensorInfo
        The two sides: equal shapes; both `FLOAT`, or the same dtype.
    """

    name: str
    base: TensorInfo
    tuned: TensorInfo

    @property
    def tuned_name(self) -> str | None:
        """The tuned side's name, or None where it is the base's."""
        return None if self.tuned.name == self.name else self.tuned.name

    @property
    def same_bytes(self) -> bool:
        """Whether both sides are the same bytes of the same file, so that they are read once."""
        return self.base.region == self.tuned.region


@dataclass(frozen=True, slots=True)
class Alias:
    """A tensor that is another one under a second name, and so is counted once.

    Attributes
    ----------
    name : str
        The tensor that is not compared on its own.
    of : str
        The tensor that stands for it, in the same checkpoint.
    side : {"base", "tuned", "both"}
        Which checkpoint stores it under that name.
    """

    name: str
    of: str
    side: Literal["base", "tuned", "both"]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Two tensors that belong together and cannot be compared.

    Attributes
    ----------
    name : str
        The base's name.
    base, tuned : TensorInfo
        The two sides.
    reason : str
        Why not, in words.
    """

    name: str
    base: TensorInfo
    tuned: TensorInfo
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
    """

    pairs: tuple[TensorPair, ...]
    only_in_base: tuple[str, ...]
    only_in_tuned: tuple[str, ...]
    aliased: tuple[Alias, ...]
    mismatched: tuple[Mismatch, ...]
    warnings: tuple[str, ...]
