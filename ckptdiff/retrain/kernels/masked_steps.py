"""Step the masked coordinates of all parameters, compiled: gather, update in registers, scatter.

A parameter is cut into tiles of 2^16 coordinates, and the masked ones of a tile are named by their 16-bit positions
(``retrain/support.py``). Whatever is not named is never written. The order of operations is that of torch's own
optimizers in float32. Parameters, and gradients, are float32 or uint16 codes of bfloat16.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.codes.bfloat16 import bf16_to_f32, round_to_bf16
from ckptdiff.codes.bits import bits_float, float_bits
from ckptdiff.codes.fetch import memory_at
from ckptdiff.codes.ordered_sums import sum_of_squares
from ckptdiff.jit import Later, helper, kernel, overload
from ckptdiff.measure.kernels.tiles import Array
from ckptdiff.retrain.kernels.shared_work import next_unit, table_of

__all__ = ["MASKED", "SPAN", "masked_steps", "sum_masked_squares"]

types = Later("numba.types")

MASKED = table_of(
    *("values", "gradients", "numel", "narrow", "narrow_gradients"),
    *("positions", "starts", "masked", "count", "first", "second", "masters", "rule", "constants"),
)
"""A parameter: addresses of its values and gradients, how many they are, and whether they are bfloat16; addresses of
the positions, of where each tile begins in these (int64, one more than tiles), how many positions there are; addresses
of the count of steps, which is one float32, and of float32 state for each position, 0 for none; `ADAMW` or `SGD`, and
the row of its constants."""
ADAMW, SGD = 0, 1
TILE_BITS = 16
SPAN = 32
"""Tiles of a unit of work: 2 Mi coordinates."""
PART = 64
"""Masked coordinates at a time. So few that the processor gathers the next ones, and waits for memory, while it still
divides and takes roots for these."""


def value_of(stored: Any) -> Any:
    """Float32 value of what is stored."""
    raise NotImplementedError("compiled code only")


@overload(value_of, jit_options={"nogil": True}, strict=False)
def _value_of(stored: Any) -> Any:
    if stored == types.uint16:
        return lambda stored: bits_float(bf16_to_f32(stored))
    return lambda stored: stored


def rounded(value: Any, like: Any) -> Any:
    """A float32 as it is stored: as it is, or to nearest even as a code; NaN becomes the quiet NaN of its sign."""
    raise NotImplementedError("compiled code only")


@overload(rounded, jit_options={"nogil": True}, strict=False)
def _rounded(value: Any, like: Any) -> Any:
    if like == types.uint16:
        return lambda value, like: round_to_bf16(float_bits(value))
    return lambda value, like: value


@helper
def begin(near: Array, where: Array, held: Array, all_masters: Array, start: int) -> Array:
    """Float32 values to start from, shape (n,): the masters, or without them what is stored.

    Where a master does not round to what is stored, something else has changed the parameter: the master follows.
    `near` is the parameter from its tile on, `where` n positions in it, `held` room for their values, and `all_masters`
    has shape (masked,) or (0,).
    """
    n = where.size
    if all_masters.size:
        masters = all_masters[start : start + n]
        for j in range(n):
            stored = near[where[j]]
            masters[j] = masters[j] if rounded(masters[j], stored) == stored else value_of(stored)
        return masters
    for j in range(n):
        held[j] = value_of(near[where[j]])
    return held[:n]


@helper
def adamw(values: Array, gradients: Array, first: Array, second: Array, constants: Array) -> None:
    """One step of AdamW (Loshchilov & Hutter 2019) on arrays of shape (n,), in the order of ``torch.optim.AdamW``.

    But where torch divides every root by c = sqrt(1 - beta2^t), eps and the rate are multiplied by it.
    """
    decay, one_minus_beta1, beta2, one_minus_beta2 = constants[0], constants[1], constants[2], constants[3]
    eps, step = constants[4], constants[5]
    for j in range(gradients.size):
        g = gradients[j]
        m = first[j] + one_minus_beta1 * (g - first[j])
        v = second[j] * beta2 + one_minus_beta2 * g * g
        first[j] = m
        second[j] = v
        values[j] = values[j] * decay - step * m / (np.sqrt(v) + eps)


@helper
def sgd(values: Array, gradients: Array, buffer: Array, constants: Array) -> None:
    """One step of SGD on arrays of shape (n,), in the order of ``torch.optim.SGD``; an empty buffer: no momentum."""
    rate, decay, momentum, fresh, nesterov = constants[0], constants[1], constants[2], constants[3], constants[4]
    for j in range(gradients.size):
        g = gradients[j] + decay * values[j]
        if buffer.size:
            b = buffer[j] * momentum + fresh * g
            buffer[j] = b
            g = g + momentum * b if nesterov > 0 else b
        values[j] = values[j] - rate * g


@helper
def state_at(address: int, masked: int) -> Array:
    """Float32 state of each masked coordinate; none without an address."""
    return memory_at(address, masked if address else 0, np.empty(0, np.float32))


@helper
def tile_of(address: int, numel: int, tile: int, like: Array) -> Array:
    """What is stored of a parameter from a tile on."""
    before = tile << TILE_BITS
    return memory_at(address + before * like.itemsize, numel - before, like)


@helper
def gather(near: Array, where: Array, slopes: Array) -> Array:
    """Float32 values of a gradient at positions of a tile, shape (n,)."""
    for j in range(where.size):
        slopes[j] = value_of(near[where[j]])
    return slopes[: where.size]


@helper
def scatter(near: Array, where: Array, held: Array) -> None:
    """Store values at positions of a tile."""
    for j in range(where.size):
        near[where[j]] = rounded(held[j], near[where[j]])


@kernel
def masked_steps(rows: Array, constants: Array, counter: Array) -> None:
    """One step of AdamW or SGD on the masked coordinates of parameters.

    State of AdamW are both moments, of SGD the momentum buffer; `masters` are those of a bfloat16 parameter, without
    which a step starts from what is stored.

    Parameters
    ----------
    rows : array of `MASKED`
    constants : float32 array, shape (k, 6)
        AdamW: 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps c, lr c / (1 - beta1^t). SGD: lr, weight_decay,
        momentum, 1 - dampening (1 where the buffer is new), 1 for Nesterov's momentum.
    counter : int64 array, shape (1,)
        Zero at first, and shared by all threads that make this call.
    """
    held, slopes = np.empty(PART, np.float32), np.empty(PART, np.float32)
    wide, codes, offsets = np.empty(0, np.float32), np.empty(0, np.uint16), np.empty(0, np.int64)
    row, unit = next_unit(rows, 0, counter)
    while row < rows.size:
        at = rows[row]
        tiles = ((at.numel - 1) >> TILE_BITS) + 1
        starts, positions = memory_at(at.starts, tiles + 1, offsets), memory_at(at.positions, at.masked, codes)
        first, second = state_at(at.first, at.masked), state_at(at.second, at.masked)
        all_masters, numbers = state_at(at.masters, at.masked), constants[at.constants]
        if at.count and unit == 0:
            memory_at(at.count, 1, wide)[0] += 1
        for tile in range(unit * SPAN, min((unit + 1) * SPAN, tiles)):
            near, near_codes = tile_of(at.values, at.numel, tile, wide), tile_of(at.values, at.numel, tile, codes)
            slope = tile_of(at.gradients, at.numel, tile, wide)
            slope_codes = tile_of(at.gradients, at.numel, tile, codes)
            for start in range(starts[tile], starts[tile + 1], PART):
                stop = min(start + PART, starts[tile + 1])
                where = positions[start:stop]
                if not (at.narrow or at.narrow_gradients):
                    for j in range(where.size):  # both in one loop, and here: as a helper it takes a tenth longer
                        place = where[j]
                        held[j] = near[place]
                        slopes[j] = slope[place]
                    masters, found = held[: where.size], slopes[: where.size]
                else:
                    found = gather(slope_codes, where, slopes) if at.narrow_gradients else gather(slope, where, slopes)
                    if at.narrow:
                        masters = begin(near_codes, where, held, all_masters, start)
                    else:
                        masters = begin(near, where, held, all_masters, start)
                if at.rule == ADAMW:
                    adamw(masters, found, first[start:stop], second[start:stop], numbers)
                else:
                    sgd(masters, found, first[start:stop], numbers)
                if at.narrow:
                    scatter(near_codes, where, masters)
                else:
                    scatter(near, where, masters)
        row, unit = next_unit(rows, row, counter)


@kernel
def sum_masked_squares(rows: Array, sums: Array, counter: Array) -> None:
    """Sum of squares over masked coordinates of gradients, in float64, one for each unit of :func:`masked_steps`."""
    slopes = np.empty(PART, np.float32)
    wide, codes, offsets = np.empty(0, np.float32), np.empty(0, np.uint16), np.empty(0, np.int64)
    row, unit = next_unit(rows, 0, counter)
    while row < rows.size:
        at = rows[row]
        tiles, total = ((at.numel - 1) >> TILE_BITS) + 1, 0.0
        starts, positions = memory_at(at.starts, tiles + 1, offsets), memory_at(at.positions, at.masked, codes)
        for tile in range(unit * SPAN, min((unit + 1) * SPAN, tiles)):
            for start in range(starts[tile], starts[tile + 1], PART):
                where = positions[start : min(start + PART, starts[tile + 1])]
                if at.narrow_gradients:
                    found = gather(tile_of(at.gradients, at.numel, tile, codes), where, slopes)
                else:
                    found = gather(tile_of(at.gradients, at.numel, tile, wide), where, slopes)
                total += sum_of_squares(found)
        sums[(rows[row - 1].end if row else 0) + unit] = total
        row, unit = next_unit(rows, row, counter)
