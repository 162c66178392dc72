"""Step the masked coordinates of a parameter, compiled: gather, update in registers, scatter.

A parameter is cut into tiles of 2^16 coordinates, and the masked ones of a tile are named by their 16-bit positions
(``retrain/support.py``). Whatever is not named is never written. Each kernel takes a range of tiles, so that threads
share a parameter. The order of operations is that of torch's own optimizers in float32.

Parameters are float32, or uint16 codes of bfloat16: each kernel is compiled for either.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from ckptdiff.codes.bfloat16 import bf16_to_f32, round_to_bf16
from ckptdiff.codes.bits import bits_float, float_bits
from ckptdiff.jit import helper, kernel, reducer
from ckptdiff.measure.kernels.tiles import Array

TILE_BITS = 16
PART = 128
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
    """One step of AdamW (Loshchilov & Hutter 2019) on arrays of shape (n,), in the order of ``torch.optim.AdamW``."""
    decay, one_minus_beta1, beta2, one_minus_beta2 = constants[0], constants[1], constants[2], constants[3]
    correction, eps, step = constants[4], constants[5], constants[6]
    for j in range(gradients.size):
        g = gradients[j]
        m = first[j] + one_minus_beta1 * (g - first[j])
        v = second[j] * beta2 + one_minus_beta2 * g * g
        first[j] = m
        second[j] = v
        values[j] = values[j] * decay - step * m / (np.sqrt(v) / correction + eps)


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


@kernel
def adamw_step(
    values: Array, gradients: Array, state: Any, positions: Array, starts: Array, span: Any, constants: Array
) -> None:
    """AdamW on the masked coordinates of tiles ``span[0]`` to ``span[1]`` - 1 of a parameter.

    Parameters
    ----------
    values, gradients : float32 or uint16 array, shape (numel,)
    state : tuple of three float32 arrays, shape (masked,)
        First moment, second moment, and the masters of a bfloat16 parameter; without them, in an empty array, a step
        starts from what is stored.
    positions : uint16 array, shape (masked,)
        Position of each masked coordinate in its tile, ascending.
    starts : int64 array, shape (tiles + 1,)
        Where each tile begins in `positions`.
    span : (int, int)
    constants : float32 array
        1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, sqrt(1 - beta2^t), eps, lr / (1 - beta1^t).
    """
    held, slopes = np.empty(PART, np.float32), np.empty(PART, np.float32)
    for tile in range(span[0], span[1]):
        near, near_gradients = values[tile << TILE_BITS :], gradients[tile << TILE_BITS :]
        for start in range(starts[tile], starts[tile + 1], PART):
            stop = min(start + PART, starts[tile + 1])
            where, n = positions[start:stop], stop - start
            masters = begin(near, where, held, state[2], start)
            for j in range(n):
                slopes[j] = value_of(near_gradients[where[j]])
            adamw(masters, slopes[:n], state[0][start:stop], state[1][start:stop], constants)
            for j in range(n):
                near[where[j]] = rounded(masters[j], near[where[j]])


@kernel
def sgd_step(
    values: Array, gradients: Array, state: Any, positions: Array, starts: Array, span: Any, constants: Array
) -> None:
    """SGD on the masked coordinates of tiles ``span[0]`` to ``span[1]`` - 1 of a parameter.

    As :func:`adamw_step`, shapes too, but `state` is the momentum buffer, empty for none, and the masters; `constants`
    are lr, weight_decay, momentum, 1 - dampening (1 where the buffer is new), and 1 for Nesterov's momentum.
    """
    held, slopes = np.empty(PART, np.float32), np.empty(PART, np.float32)
    for tile in range(span[0], span[1]):
        near, near_gradients = values[tile << TILE_BITS :], gradients[tile << TILE_BITS :]
        for start in range(starts[tile], starts[tile + 1], PART):
            stop = min(start + PART, starts[tile + 1])
            where, n = positions[start:stop], stop - start
            masters = begin(near, where, held, state[1], start)
            for j in range(n):
                slopes[j] = value_of(near_gradients[where[j]])
            sgd(masters, slopes[:n], state[0][start:stop], constants)
            for j in range(n):
                near[where[j]] = rounded(masters[j], near[where[j]])


@reducer
def sum_squares(gradients: Array) -> float:
    """Sum of squares in float64."""
    total = 0.0
    for j in range(gradients.size):
        total += np.float64(gradients[j]) * np.float64(gradients[j])
    return total


@kernel
def sum_masked_squares(gradients: Array, positions: Array, starts: Array, span: Any) -> float:
    """Sum of squares over the masked coordinates of a gradient, in float64; shapes as in :func:`adamw_step`."""
    slopes = np.empty(PART, np.float32)
    total = 0.0
    for tile in range(span[0], span[1]):
        near = gradients[tile << TILE_BITS :]
        for start in range(starts[tile], starts[tile + 1], PART):
            stop = min(start + PART, starts[tile + 1])
            for j in range(stop - start):
                slopes[j] = value_of(near[positions[start + j]])
            total += sum_squares(slopes[: stop - start])
    return total
