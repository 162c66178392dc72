"""Kernels that turn stored codes into panels of values."""

from __future__ import annotations

from ckptdiff.codes.bfloat16 import bf16_to_f32, round_to_bf16
from ckptdiff.jit import kernel
from ckptdiff.measure.kernels.tiles import Array


@kernel
def widen_bf16(codes: Array, out: Array) -> None:
    """Write bfloat16 codes, read-only uint16 of shape (n,), as float32 codes, uint32 of that shape."""
    for i in range(codes.size):
        out[i] = bf16_to_f32(codes[i])


@kernel
def cast_to_bf16(codes: Array, out: Array) -> None:
    """Round float32 codes to bfloat16, to nearest even, and write them as float32 codes.

    Both arrays are uint32 of shape (n,), the first one read-only.
    """
    for i in range(codes.size):
        out[i] = bf16_to_f32(round_to_bf16(codes[i]))
