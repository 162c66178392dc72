"""Find out which values share a scale, from the shapes of a weight and of its scales."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ckptdiff.checkpoint.header import TensorInfo

__all__ = ["OddScaleError", "block_of", "grid_of"]

Block = tuple[int, int]

_USUAL = (128, 128)
"""Blocks of fp8 where nothing is said."""


class OddScaleError(Exception):
    """Why codes cannot be decoded for certain, as the end of a sentence about their tensor."""


def grid_of(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """How many blocks there are along each axis; the last two are cut into blocks, the last block may be smaller."""
    *ahead, height, width = shape if len(shape) > 1 else (1, *shape)
    return (*ahead, -(-height // block[0]), -(-width // block[1]))


def block_of(shape: tuple[int, ...], scales: TensorInfo, said: Sequence[Block | None], where: str) -> Block:
    """Rows and columns that share a scale; more rows than a matrix has are all of the weight.

    Parameters
    ----------
    shape : tuple of int
        Of the weight.
    scales : TensorInfo
    said : sequence of (tuple of (int, int) or None)
        The blocks that the format or a configuration names; None stands for a scale for each row, or for all.
    where : str
        Who says so.

    Raises
    ------
    OddScaleError
        If the scales' shape is another one, or, where nothing is said, leaves open which block is meant.
    """
    blocks = list(dict.fromkeys(block for block in said if block is not None))
    for block in blocks:
        if _is_grid(scales.shape, grid_of(shape, block)):
            return min(block[0], shape[-2] if len(shape) > 1 else 1), block[1]
    part = scales.name.rpartition(".")[2]
    if blocks and None not in said:
        sizes = " or ".join(f"{rows}x{columns}" for rows, columns in blocks)
        grids = " or ".join(str(list(grid_of(shape, block))) for block in blocks)
        raise OddScaleError(
            f"{part} has shape {list(scales.shape)}, and blocks of {sizes} ({where}) make {grids} of {list(shape)}"
        )
    whole = _without_blocks(shape, scales.shape)
    if whole is not None:
        return whole
    if said:
        raise OddScaleError(f"{part} has shape {list(scales.shape)}, and {where} speaks of no blocks")
    found = _guesses(shape, scales.shape)
    if len(found) > 1:
        sizes = " or ".join(f"{rows}x{columns}" for rows, columns in found)
        raise OddScaleError(
            f"{part} of shape {list(scales.shape)} may be of blocks of {sizes}, and {where} does not say"
        )
    if not found:
        raise OddScaleError(f"{part} of shape {list(scales.shape)} does not fit {list(shape)}")
    return found[0]


def _is_grid(stored: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    """Whether scales are stored in the shape of a grid; one of one block may have any, ModelOpt has axes of one."""
    spread = (*grid[:-1], 1, grid[-1], 1)
    return stored in (grid, spread) or (math.prod(stored) == math.prod(grid) == 1)


def _without_blocks(shape: tuple[int, ...], stored: tuple[int, ...]) -> Block | None:
    """The block, if there is one scale for all, for each matrix, for each row, or for each column of fused matrices."""
    *ahead, height, width = shape if len(shape) > 1 else (1, *shape)
    lead = tuple(ahead)
    if math.prod(stored) == 1:
        return math.prod(shape[:-1]), width
    if stored in ((*lead, height), (*lead, height, 1)):
        return 1, width
    if lead and stored in (lead, (*lead, 1), (*lead, 1, 1)):
        return height, width
    if lead and stored == (*lead, 1, width):
        return height, 1
    return None


def _guesses(shape: tuple[int, ...], stored: tuple[int, ...]) -> list[Block]:
    """Blocks that explain a grid: the usual ones, and equal parts."""
    *ahead, height, width = shape if len(shape) > 1 else (1, *shape)
    if len(stored) == len(ahead) + 4 and stored[-3] == stored[-1] == 1:
        stored = (*stored[:-3], stored[-2])
    if len(stored) < 2 or stored[:-2] != tuple(ahead) or not math.prod(stored):
        return []
    found = []
    if stored == grid_of(shape, _USUAL):
        found.append((min(_USUAL[0], height), min(_USUAL[1], width)))
    if height % stored[-2] == 0 and width % stored[-1] == 0 and stored[-1] < width:
        found.append((height // stored[-2], width // stored[-1]))
    return list(dict.fromkeys(found))
