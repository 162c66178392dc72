"""Multiply the differences from the base of each two steps, and sum them up in float64.

A tile's codes are still in the cache when it is multiplied. Differences of sixty-four coordinates at all steps are kept
as float64, beside which the sums of one step stay in registers while it meets those before it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.codes.bfloat16 import bf16_to_f32
from ckptdiff.codes.bits import bits_float
from ckptdiff.codes.differences import add_products, add_squared_products, differences, put_reals
from ckptdiff.codes.lanes import LANES, differing, load_codes
from ckptdiff.jit import Later, helper, overload
from ckptdiff.measure.kernels.tiles import Array

types = Later("numba.types")

TRACK_TILE = 1 << 13
"""Coordinates that are taken at a time. Their squares are summed in float32, 256 in each sum, before float64."""
_TURN = 5
"""Odd, so that sampled tiles are at every place of a group in turn, and rows of a matrix do not keep step with them."""


@helper
def value16(code: Any, values: Array) -> Any:
    """Value of a 16-bit code: of bfloat16, or by table, shape (65536,)."""
    return bits_float(bf16_to_f32(code)) if values.size == 0 else values[code]


@helper
def value_wide(code: Any, values: Array) -> Any:
    """Value of a code of float32 or float64; the table has shape (0,)."""
    return bits_float(code)


def value_of(code: Any, values: Array) -> Any:
    """Value of a code; the table has shape (0,) or (65536,)."""
    raise NotImplementedError("compiled code only")


@overload(value_of, jit_options={"nogil": True}, inline="never", strict=False)
def _value_of(code: Any, values: Any) -> Any:
    chosen = value16 if code == types.uint16 else value_wide
    return lambda code, values: chosen(code, values)


def in_sample(tile: Any, every: int) -> Any:
    """Whether a tile of a tensor, by its number, is the one of its group of so many that is multiplied."""
    return tile % every == tile // every * _TURN % every


is_sampled = helper(in_sample)
"""The same in compiled code."""


@helper
def multiply_tile(start: int, stop: int, codes: Array, deltas: Array, products: Array) -> None:
    """Add the products of a tile whose codes are bfloat16, float32 or float64."""
    squared = len(products) > 1
    for i in range(start, stop, LANES):
        base, pair = load_codes(codes, 0, i), 0
        for step in range(codes.shape[0] - 1):
            new = load_codes(codes, step + 1, i)
            delta = differences(base, new)
            put_reals(deltas, step, delta)
            if differing(base, new) != 0:
                for other in range(step + 1):
                    add_products(products[0], pair + other, delta, deltas, other)
                    if squared:
                        add_squared_products(products[1], pair + other, delta, deltas, other)
            pair += step + 1


@helper
def multiply_exactly(start: int, stop: int, values: Array, codes: Array, deltas: Array, products: Array) -> None:
    """The same for codes of any format; a difference that is not finite counts as none."""
    for i in range(start, stop):
        base, pair = np.float64(value_of(codes[0, i], values)), 0
        for step in range(codes.shape[0] - 1):
            delta = np.float64(value_of(codes[step + 1, i], values)) - base
            deltas[step, 0] = delta if abs(delta) < np.inf else 0.0
            for other in range(step + 1):
                product = deltas[step, 0] * deltas[other, 0]
                products[0, pair + other, 0] += product
                if len(products) > 1:
                    products[1, pair + other, 0] += product * product
            pair += step + 1


@helper
def multiply_piece(first: int, n: int, every: int, values: Array, codes: Array, deltas: Array, products: Array) -> None:
    """Write the products of a piece, which begins at coordinate ``first`` of its tensor.

    Parameters
    ----------
    every : int
        Of so many tiles one is multiplied.
    values : float32 array
        Value of each code; empty for bfloat16, float32 and float64.
    codes : array of codes, shape (1 + steps, coordinates)
        Equal on all sides from coordinate ``n`` on, to the next multiple of LANES.
    deltas : float64 array, shape (steps, LANES)
        Work space.
    products : float64 array, shape (1 or 2, pairs, PRODUCT_SUMS)
        Of each step with itself and all before it, (0, 0), (1, 0), (1, 1), (2, 0), ...; then squares of the products.
    """
    for exact in range(1 if values.size > 0 else 0, 2):
        products[:] = 0
        for start in range(0, n, TRACK_TILE):
            if is_sampled((first + start) // TRACK_TILE, every):
                stop = min(start + TRACK_TILE, n)
                if exact:
                    multiply_exactly(start, stop, values, codes, deltas, products)
                else:
                    multiply_tile(start, stop, codes, deltas, products)
        if np.isfinite(products).all():  # else there is NaN, Inf or what float32 cannot hold: rare, and looked at again
            return
