"""Say what an exact weight delta does to each tensor: the records of its index."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias

from ckptdiff.checkpoint import DTYPES
from ckptdiff.patch.coded_block import Coding

__all__ = ["BLOCK_CODES", "Blob", "Delta", "Extent", "TensorDelta", "TunedFile", "extent_of"]

BLOCK_CODES = 1 << 20
"""Codes of a block."""
State: TypeAlias = Literal["same", "changed", "whole", "lost"]
"""Of a tensor: the base's, the base's with steps, all its bytes in the delta, or not there any more."""


class Extent(NamedTuple):
    """How much a tensor holds."""

    nbytes: int
    coding: Coding
    """How its bytes are taken as codes."""
    codes: int
    """How many these are."""
    blocks: int
    """Blocks that they fill."""


@lru_cache(1 << 16)
def extent_of(dtype: str, shape: tuple[int, ...]) -> Extent:
    """How much tensors of a dtype and shape hold, of which tens of thousands may have the same."""
    nbytes, coding = math.prod(shape) * DTYPES[dtype].bits // 8, Coding.of(dtype)
    codes = nbytes // coding.width
    return Extent(nbytes, coding, codes, -(-codes // BLOCK_CODES))


@dataclass(frozen=True, slots=True)
class Blob:
    """A zlib stream in the file."""

    offset: int
    stored: int
    size: int


@dataclass(frozen=True, slots=True)
class TunedFile:
    """A safetensors file of the tuned side."""

    name: str
    """Relative to the checkpoint's folder."""
    size: int
    header: Blob
    """Its first bytes, up to the first tensor's."""


class TensorDelta(NamedTuple):
    """What becomes of one tensor."""

    name: str
    state: State
    dtype: str
    """Of the tuned side; of a lost tensor, of the base."""
    shape: tuple[int, ...]
    file: int
    """Which of the tuned side's files holds it; -1 of a lost one."""
    before: str | None
    """Digest of the base's bytes; None where they do not matter: of a whole or a lost tensor."""
    after: str | None
    """Digest of the tuned side's bytes; None of a lost one."""
    changed: int
    """Codes that differ; of a whole tensor all."""
    extent: Extent
    """How much a tensor of this dtype and shape holds."""
    offset: int = 0
    sizes: tuple[int, ...] = ()
    """Stored bytes of each block; none of a tensor that is the same."""
    replaces: bool = False
    """Whether the base has a tensor of this name, of another dtype or shape."""

    @property
    def nbytes(self) -> int:
        """Stored bytes of the tensor."""
        return self.extent.nbytes

    @property
    def coding(self) -> Coding:
        """How they are taken as codes."""
        return self.extent.coding

    @property
    def codes(self) -> int:
        """How many these are."""
        return self.extent.codes

    @property
    def blocks(self) -> int:
        """Blocks that they fill."""
        return self.extent.blocks

    @property
    def stored(self) -> int:
        """Bytes that it takes in the file."""
        return sum(self.sizes)


@dataclass(frozen=True, slots=True)
class Delta:
    """What the index of a delta says.

    Attributes
    ----------
    made_by : str
        The program and its version.
    base, tuned : str
        Where the two sides lay.
    base_files : tuple of (str, int, str)
        Name, size and SHA-256 of the header of each file of the base.
    single : bool
        Whether the tuned side is one file, not a folder.
    files : tuple of TunedFile
    index : tuple of (str, Blob) or None
        Name and bytes of the tuned side's ``index.json``.
    tensors : mapping of str to TensorDelta
        Those of the tuned side in the order of their bytes, then lost ones.
    """

    made_by: str
    base: str
    tuned: str
    base_files: tuple[tuple[str, int, str], ...]
    single: bool
    files: tuple[TunedFile, ...]
    index: tuple[str, Blob] | None
    tensors: Mapping[str, TensorDelta]
