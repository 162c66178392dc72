"""Hold the masked coordinates of one parameter in the form in which its device reaches them quickly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ckptdiff.retrain.packed import PackedMask
from ckptdiff.runfile.schema import BIT_ORDER

SUPPORT_TILE = 1 << 16
_SPAN = 32
"""Tiles in one piece of work: 2 Mi coordinates."""
_BLOCK_BYTES = 1 << 17


@dataclass(frozen=True, eq=False, slots=True)
class TileSupport:
    """For the compiled kernels: two bytes per masked coordinate."""

    positions: NDArray[np.uint16]
    """Positions within tiles of 2^16 coordinates, ascending; shape (count,)."""
    starts: NDArray[np.int64]
    """Where each tile begins in `positions`; shape (tiles + 1,)."""

    @property
    def count(self) -> int:
        """Masked coordinates."""
        return int(self.positions.size)

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.positions.nbytes + self.starts.nbytes

    @property
    def pieces(self) -> int:
        """How many spans there are."""
        return -(-(self.starts.size - 1) // _SPAN)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Ranges of tiles for one thread each."""
        tiles = self.starts.size - 1
        for first in range(0, tiles, _SPAN):
            yield first, min(first + _SPAN, tiles)


@dataclass(frozen=True, eq=False, slots=True)
class IndexSupport:
    """For torch's own indexing: row-major indices on the parameter's device, four bytes each (eight beyond 2^31)."""

    index: Tensor

    @property
    def count(self) -> int:
        """Masked coordinates."""
        return int(self.index.numel())

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return int(self.index.nbytes)


Support: TypeAlias = TileSupport | IndexSupport


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
        return TileSupport(np.concatenate([np.empty(0, np.uint16), *positions]), np.cumsum(counts))
    dtype = np.int32 if mask.numel <= 1 << 31 else np.int64
    index = np.concatenate([np.empty(0, dtype), *(indices.astype(dtype) for indices in found)])
    return IndexSupport(torch.from_numpy(index).to(parameter.device))


def is_compiled(parameter: Tensor) -> bool:
    """Whether the compiled kernels serve a parameter."""
    return (
        parameter.device.type == "cpu"
        and parameter.dtype in (torch.float32, torch.bfloat16)
        and parameter.is_contiguous()
    )


def flat_view(tensor: Tensor) -> NDArray[Any]:
    """The memory of a contiguous tensor: float32 values, or uint16 codes of bfloat16."""
    flat = tensor.detach().view(-1)
    if tensor.dtype == torch.bfloat16:
        codes: NDArray[Any] = flat.view(torch.int16).numpy().view(np.uint16)
        return codes
    values: NDArray[Any] = flat.numpy()
    return values
