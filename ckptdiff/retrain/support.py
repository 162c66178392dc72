"""Hold the masked coordinates of one parameter in the form in which its device reaches them quickly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ckptdiff.retrain.kernels.masked_steps import SPAN, TILE_BITS
from ckptdiff.retrain.packed import PackedMask
from ckptdiff.runfile.schema import BIT_ORDER

SUPPORT_TILE = 1 << TILE_BITS
_BLOCK_BYTES = 1 << 17
COMPILED = torch.float32, torch.bfloat16
NARROW = torch.bfloat16, torch.float16
"""Parameters whose state is float32, as masters are."""


@dataclass(frozen=True, eq=False, slots=True)
class TileSupport:
    """For the compiled kernels: two bytes per masked coordinate."""

    positions: Tensor
    """Positions within tiles of 2^16 coordinates, ascending; the bits of uint16, as int16; shape (count,)."""
    starts: Tensor
    """Where each tile begins in `positions`; int64, shape (tiles + 1,)."""
    units: int
    """Units of work of a kernel."""

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return int(self.positions.nbytes + self.starts.nbytes)


@dataclass(frozen=True, eq=False, slots=True)
class IndexSupport:
    """For torch's own indexing: row-major indices on the parameter's device, four bytes each (eight beyond 2^31)."""

    index: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return int(self.index.nbytes)


Support: TypeAlias = TileSupport | IndexSupport


@dataclass(frozen=True, eq=False, slots=True)
class Masked:
    """What an optimizer knows of the mask of a parameter."""

    support: Support
    count: int
    """Masked coordinates."""
    fingerprint: int
    shape: tuple[int, ...]
    name: str


def support_of(mask: PackedMask, parameter: Tensor) -> Support:
    """Unpack a mask for a parameter.

    The compiled kernels serve contiguous float32 and bfloat16 parameters in main memory; torch serves all others.
    """
    found = [
        np.flatnonzero(np.unpackbits(mask.bits[start : start + _BLOCK_BYTES], bitorder=BIT_ORDER)) + 8 * start
        for start in range(0, mask.bits.size, _BLOCK_BYTES)
    ]
    if is_compiled(parameter):
        tiles = -(-mask.numel // SUPPORT_TILE)
        counts = np.zeros(tiles + 1, np.int64)
        for indices in found:
            if indices.size:
                held = np.bincount((indices - indices[0] // SUPPORT_TILE * SUPPORT_TILE) // SUPPORT_TILE)
                counts[1 + indices[0] // SUPPORT_TILE :][: held.size] += held
        positions = [(indices & (SUPPORT_TILE - 1)).astype(np.uint16) for indices in found]
        joined = np.concatenate([np.empty(0, np.uint16), *positions])
        return TileSupport(
            torch.from_numpy(joined.view(np.int16)), torch.from_numpy(np.cumsum(counts)), -(-tiles // SPAN)
        )
    dtype = np.int32 if mask.numel <= 1 << 31 else np.int64
    index = np.concatenate([np.empty(0, dtype), *(indices.astype(dtype) for indices in found)])
    return IndexSupport(torch.from_numpy(index).to(parameter.device))


def is_compiled(parameter: Tensor) -> bool:
    """Whether the compiled kernels serve a parameter."""
    return parameter.is_cpu and parameter.dtype in COMPILED and parameter.is_contiguous()


def state_dtype(parameter: Tensor) -> torch.dtype:
    """Of what an optimizer knows of a parameter's coordinates."""
    return torch.float32 if parameter.dtype in NARROW else parameter.dtype
