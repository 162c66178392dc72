"""Optimizer steps on the masked coordinates of a parameter: gather, update in registers, scatter.

A parameter is cut into tiles of 2^16 coordinates, and the masked ones of a tile are named by their 16-bit positions
(``retrain/support.py``). Whatever is not named is never written. Each kernel takes a range of tiles, so that threads
share a parameter. The order of operations is that of torch's own optimizers in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.backends.kernel_cache import helper, kernel, reducer
from ckptdiff.backends.kernels.bits import bits_float, float_bits
from ckptdiff.backends.kernels.stored import round_to_bf16
from ckptdiff.backends.kernels.tiles import Array

__all__ = ["adamw_bf16", "adamw_f32", "sgd_bf16", "sgd_f32", "square_bf16", "square_f32"]

TILE_BITS = 16
PART = 128
"""Masked coordinates at a time. So few that the processor gathers the next ones, and waits for memory, while it still
divides and takes roots for these."""


@helper
def widened(code: Any) -> Any:
    """Float32 value of a bfloat16 code."""
    return bits_float(np.uint32(np.uint32(code) << np.uint32(16)))


@helper
def narrowed(value: Any) -> Any:
    """Bfloat16 code of a float32, to nearest even; NaN becomes the quiet NaN of its sign."""
    return round_to_bf16(float_bits(value))


@helper
def begin(codes: Array, where: Array, held: Array, all_masters: Array, start: int) -> Array:
    """Float32 values to start from: the masters, or without them what is stored.

    Where a master does not round to what is stored, something else has changed the parameter: the master follows.
    """
    n = where.size
    if all_masters.size:
        masters = all_masters[start : start + n]
        for j in range(n):
            code = codes[where[j]]
            masters[j] = masters[j] if narrowed(masters[j]) == code else widened(code)
        return masters
    for j in range(n):
        held[j] = widened(codes[where[j]])
    return held[:n]


@helper
def adamw(values: Array, gradients: Array, first: Array, second: Array, constants: Array) -> None:
    """One step of AdamW (Loshchilov & Hutter 2019), in the order of operations of ``torch.optim.AdamW``."""
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
    """One step of SGD, in the order of operations of ``torch.optim.SGD``; an empty buffer stands for no momentum."""
    rate, decay, momentum, fresh, nesterov = constants[0], constants[1], constants[2], constants[3], constants[4]
    for j in range(gradients.size):
        g = gradients[j] + decay * values[j]
        if buffer.size:
            b = buffer[j] * momentum + fresh * g
            buffer[j] = b
            g = g + momentum * b if nesterov > 0 else b
        values[j] = values[j] - rate * g


@kernel
def adamw_f32(
    values: Array, gradients: Array, state: Any, positions: Array, starts: Array, span: Any, constants: Array
) -> None:
    """AdamW on the masked coordinates of tiles ``span[0]`` to ``span[1]`` - 1 of a float32 parameter.

    Parameters
    ----------
    values, gradients : float32 array, shape (numel,)
    state : tuple of three float32 arrays, shape (masked,)
        First moment, second moment, and an array that is not used.
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
            for j in range(n):
                held[j] = near[where[j]]
                slopes[j] = near_gradients[where[j]]
            adamw(held[:n], slopes[:n], state[0][start:stop], state[1][start:stop], constants)
            for j in range(n):
                near[where[j]] = held[j]


@kernel
def adamw_bf16(
    values: Array, gradients: Array, state: Any, positions: Array, starts: Array, span: Any, constants: Array
) -> None:
    """AdamW on the masked coordinates of a bfloat16 parameter.

    As :func:`adamw_f32`, except that `values` and `gradients` are uint16 codes, and the third array of `state` holds
    the float32 masters, or is empty: then the step starts from the rounded value.
    """
    held, slopes = np.empty(PART, np.float32), np.empty(PART, np.float32)
    for tile in range(span[0], span[1]):
        near, near_gradients = values[tile << TILE_BITS :], gradients[tile << TILE_BITS :]
        for start in range(starts[tile], starts[tile + 1], PART):
            stop = min(start + PART, starts[tile + 1])
            where, n = positions[start:stop], stop - start
            masters = begin(near, where, held, state[2], start)
            for j in range(n):
                slopes[j] = widened(near_gradients[where[j]])
            adamw(masters, slopes[:n], state[0][start:stop], state[1][start:stop], constants)
            for j in range(n):
                near[where[j]] = narrowed(masters[j])


@kernel
def sgd_f32(
    values: Array, gradients: Array, state: Any, positions: Array, starts: Array, span: Any, constants: Array
) -> None:
    """SGD on the masked coordinates of a float32 parameter.

    As :func:`adamw_f32`, except that `state` is the momentum buffer, empty for none, and an array that is not used, and
    `constants` are lr, weight_decay, momentum, 1 - dampening (1 at the first step), and 1 for Nesterov's momentum.
    """
    held, slopes = np.empty(PART, np.float32), np.empty(PART, np.float32)
    for tile in range(span[0], span[1]):
        near, near_gradients = values[tile << TILE_BITS :], gradients[tile << TILE_BITS :]
        for start in range(starts[tile], starts[tile + 1], PART):
            stop = min(start + PART, starts[tile + 1])
            where, n = positions[start:stop], stop - start
            for j in range(n):
                held[j] = near[where[j]]
                slopes[j] = near_gradients[where[j]]
            sgd(held[:n], slopes[:n], state[0][start:stop], constants)
            for j in range(n):
                near[where[j]] = held[j]


@kernel
def sgd_bf16(
    values: Array, gradients: Array, state: Any, positions: Array, starts: Array, span: Any, constants: Array
) -> None:
    """SGD on the masked coordinates of a bfloat16 parameter; parameters as in :func:`sgd_f32` and :func:`adamw_bf16`.

    `state` is the momentum buffer and the masters.
    """
    held, slopes = np.empty(PART, np.float32), np.empty(PART, np.float32)
    for tile in range(span[0], span[1]):
        near, near_gradients = values[tile << TILE_BITS :], gradients[tile << TILE_BITS :]
        for start in range(starts[tile], starts[tile + 1], PART):
            stop = min(start + PART, starts[tile + 1])
            where, n = positions[start:stop], stop - start
            masters = begin(near, where, held, state[1], start)
            for j in range(n):
                slopes[j] = widened(near_gradients[where[j]])
            sgd(masters, slopes[:n], state[0][start:stop], constants)
            for j in range(n):
                near[where[j]] = narrowed(masters[j])


@reducer
def sum_squares(gradients: Array) -> float:
    """Sum of squares in float64."""
    total = 0.0
    for j in range(gradients.size):
        total += np.float64(gradients[j]) * np.float64(gradients[j])
    return total


@kernel
def square_f32(gradients: Array, positions: Array, starts: Array, span: Any) -> float:
    """Sum of squares over the masked coordinates of a float32 gradient, in float64."""
    slopes = np.empty(PART, np.float32)
    total = 0.0
    for tile in range(span[0], span[1]):
        near = gradients[tile << TILE_BITS :]
        for start in range(starts[tile], starts[tile + 1], PART):
            stop = min(start + PART, starts[tile + 1])
            for j in range(stop - start):
                slopes[j] = near[positions[start + j]]
            total += sum_squares(slopes[: stop - start])
    return total


@kernel
def square_bf16(gradients: Array, positions: Array, starts: Array, span: Any) -> float:
    """Sum of squares over the masked coordinates of a bfloat16 gradient, given as uint16 codes."""
    slopes = np.empty(PART, np.float32)
    total = 0.0
    for tile in range(span[0], span[1]):
        near = gradients[tile << TILE_BITS :]
        for start in range(starts[tile], starts[tile + 1], PART):
            stop = min(start + PART, starts[tile + 1])
            for j in range(stop - start):
                slopes[j] = widened(near[positions[start + j]])
            total += sum_squares(slopes[: stop - start])
    return total
