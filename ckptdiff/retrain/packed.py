"""Hold the mask of one parameter, one bit per coordinate. NumPy only."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.errors import MaskError, first_few, plural
from ckptdiff.runfile.schema import BIT_ORDER, packed_bytes

_BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class PackedMask:
    """A mask in memory: an eighth of a byte per coordinate.

    Attributes
    ----------
    shape : tuple of int
        Shape of the parameter.
    bits : uint8 array, shape (ceil(numel / 8),)
        Row-major, least significant bit first; bits after the last coordinate are zero. Read-only.

    Raises
    ------
    ValueError
        Bits of another dtype or number than the shape asks for.

    Examples
    --------
    >>> import numpy as np
    >>> from ckptdiff.retrain import PackedMask
    >>> mask = PackedMask.of(np.eye(3, dtype=bool))
    >>> mask.count, mask.inverted().count, mask.bits.size
    (3, 6, 2)
    """

    shape: tuple[int, ...]
    bits: NDArray[np.uint8]

    def __post_init__(self) -> None:
        if self.bits.dtype != np.uint8 or self.bits.shape != (packed_bytes(self.numel),):
            raise ValueError(f"{self.bits.dtype} bits of shape {self.bits.shape} for a mask of shape {self.shape}")
        if self.numel % 8 and self.bits[-1] >> self.numel % 8:
            # Whoever else wrote the run file may have left something there.
            bits = self.bits.copy()
            bits[-1] &= (1 << self.numel % 8) - 1
        else:
            bits = self.bits.view()
        bits.flags.writeable = False  # what is trained with a mask would not follow it
        object.__setattr__(self, "bits", bits)

    @classmethod
    def of(cls, dense: NDArray[np.bool_]) -> PackedMask:
        """Pack booleans of the parameter's shape."""
        return cls(dense.shape, np.packbits(dense, bitorder=BIT_ORDER))

    @property
    def numel(self) -> int:
        """Coordinates of the parameter."""
        return math.prod(self.shape)

    @cached_property
    def count(self) -> int:
        """Coordinates in the mask."""
        return int(np.bitwise_count(self.bits).sum(dtype=np.int64))

    @cached_property
    def fingerprint(self) -> int:
        """Checksum of the mask (CRC-32), by which an optimizer's state knows its mask."""
        return zlib.crc32(self.bits.data)

    def dense(self) -> NDArray[np.bool_]:
        """Booleans of the parameter's shape."""
        return np.unpackbits(self.bits, count=self.numel, bitorder=BIT_ORDER).view(np.bool_).reshape(self.shape)

    def inverted(self) -> PackedMask:
        """The coordinates that this mask leaves out."""
        return PackedMask(self.shape, ~self.bits)

    def shuffled(self, rng: np.random.Generator) -> PackedMask:
        """A mask of equally many coordinates, drawn at random without replacement."""
        sizes = [min(_BLOCK, self.numel - start) for start in range(0, self.numel, _BLOCK)]
        if not sizes:
            return self
        bits = np.empty_like(self.bits)
        left, chosen = self.numel, self.count
        for block, size in enumerate(sizes):
            # How many of the coordinates that are left to draw fall into this block.
            share = int(rng.hypergeometric(chosen, left - chosen, size))
            dense = np.zeros(size, np.bool_)
            dense[rng.choice(size, share, replace=False, shuffle=False)] = True
            bits[block * _BLOCK // 8 : (block + 1) * _BLOCK // 8] = np.packbits(dense, bitorder=BIT_ORDER)
            left, chosen = left - size, chosen - share
        return PackedMask(self.shape, bits)

    def __or__(self, other: PackedMask) -> PackedMask:
        return PackedMask(self.shape, self.bits | self._fitting(other))

    def __and__(self, other: PackedMask) -> PackedMask:
        return PackedMask(self.shape, self.bits & self._fitting(other))

    def __sub__(self, other: PackedMask) -> PackedMask:
        return PackedMask(self.shape, self.bits & ~self._fitting(other))

    def _fitting(self, other: PackedMask) -> NDArray[np.uint8]:
        if other.shape != self.shape:
            raise MaskError("masks of different shapes cannot be combined", expected=self.shape, found=other.shape)
        return other.bits


def require_fit(mask: object, shape: tuple[int, ...], name: str | None) -> PackedMask:
    """The mask of a parameter of this shape, and of this name if it is known.

    Raises MaskError if it is no PackedMask, or one of another shape.
    """
    if not isinstance(mask, PackedMask):
        raise MaskError(
            "a mask is not packed",
            tensor=name,
            expected="a PackedMask",
            found=type(mask).__name__,
            hint="PackedMask.of(dense) packs a NumPy array of booleans",
        )
    if mask.shape != shape:
        raise MaskError(
            "a mask does not fit its parameter",
            tensor=name,
            expected=f"a mask of shape {shape}",
            found=mask.shape,
            hint="load masks into the model they were made of; of FSDP, only fully_shard keeps shapes",
        )
    return mask


def nothing_to_train(masks: Mapping[Any, PackedMask], hint: str) -> MaskError:
    """The error of an optimizer without a parameter that has a masked coordinate."""
    names = getattr(masks, "names", {}).values()
    return MaskError(
        "no parameter of the optimizer has a masked coordinate: there is nothing to train",
        expected=f"some of the {plural(len(masks), 'masked parameter')}" + (f", {first_few(names)}" if names else ""),
        found="none of them, or empty masks",
        hint=hint,
    )
