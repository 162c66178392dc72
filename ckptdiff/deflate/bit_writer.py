"""Write bits into bytes, first bit lowest, from kernels: a code goes out with one store that no alignment binds."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from ckptdiff.deflate.huffman import Array
from ckptdiff.jit import Later, helper, intrinsic

ir, types = Later("llvmlite.ir"), Later("numba.types")

Bits: TypeAlias = tuple[Any, Any, Any]
"""Bits that are not in a full byte yet (uint64), how many they are (uint64, below 8), and the byte they go to."""


def _place(context: Any, builder: Any, kind: Any, array: Any, offset: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    byte = builder.gep(builder.bitcast(data, ir.IntType(8).as_pointer()), [offset])
    return builder.bitcast(byte, ir.IntType(64).as_pointer())


@intrinsic
def load_word(_: Any, array: Any, offset: Any) -> Any:
    """The eight bytes of a uint8 array from an offset on, as a uint64 in the machine's order; nothing checks bounds."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load(_place(context, builder, signature.args[0], *values), align=1)

    return types.uint64(array, types.intp), build


@intrinsic
def store_word(_: Any, array: Any, offset: Any, word: Any) -> Any:
    """Write a uint64 to the eight bytes of a uint8 array from an offset on; nothing checks bounds."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store(values[2], _place(context, builder, signature.args[0], *values[:2]), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.uint64), build


@intrinsic
def equal_after(_: Any, difference: Any) -> Any:
    """How many of the first bytes are equal in two words that differ, from their exclusive or."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.lshr(builder.cttz(values[0], ir.Constant(ir.IntType(1), 1)), ir.Constant(ir.IntType(64), 3))

    return types.int64(types.uint64), build


@intrinsic
def equal_before(_: Any, difference: Any) -> Any:
    """How many of the last bytes are equal in two words that differ, from their exclusive or."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.lshr(builder.ctlz(values[0], ir.Constant(ir.IntType(1), 1)), ir.Constant(ir.IntType(64), 3))

    return types.int64(types.uint64), build


@helper
def put(out: Array, state: Bits, code: int, bits: int) -> Bits:
    """Append up to 56 bits to bytes, shape (n,); up to eight bytes from the state's byte on are overwritten."""
    pending, count, position = state
    pending |= np.uint64(code) << count
    store_word(out, position, pending)
    count += np.uint64(bits)
    return pending >> (count & np.uint64(56)), count & np.uint64(7), position + np.int64(count >> np.uint64(3))
