"""Bit tricks that Numba lacks: sixty-four flags or comparisons to a word, lowest and highest set bit, bits of a float.

Each is portable LLVM IR, so the same source becomes one or two instructions with AVX-512, a few with AVX2 or NEON.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

__all__ = ["bits_float", "changed64", "float_bits", "floor_log2", "lowest_bit", "pack64", "population"]

_FLAGS = 64


@intrinsic
def pack64(typing: Any, flags: Any, start: Any) -> Any:
    """Word whose bit k is set where the byte ``flags[start + k]`` is not zero."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = make_array(signature.args[0])(context, builder, args[0])
        vector = ir.VectorType(ir.IntType(8), _FLAGS)
        address = builder.gep(array.data, [args[1]])
        load = builder.load(builder.bitcast(address, vector.as_pointer()))
        load.align = 1
        return builder.bitcast(builder.icmp_unsigned("!=", load, ir.Constant(vector, [0] * _FLAGS)), ir.IntType(64))

    return types.uint64(flags, types.intp), generate


@intrinsic
def changed64(typing: Any, left: Any, right: Any, start: Any, magnitude: Any) -> Any:
    """Word whose bit k is set where codes ``start + k`` differ and are not +0 and -0.

    Both arrays are read from ``start`` to ``start + 63``, whatever their size.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = ir.VectorType(ir.IntType(signature.args[0].dtype.bitwidth), _FLAGS)
        loads = []
        for kind, value in zip(signature.args[:2], args[:2], strict=True):
            data = make_array(kind)(context, builder, value).data
            load = builder.load(builder.bitcast(builder.gep(data, [args[2]]), lanes.as_pointer()))
            load.align = 1
            loads.append(load)
        one = builder.insert_element(ir.Constant(lanes, ir.Undefined), args[3], ir.Constant(ir.IntType(32), 0))
        order = ir.Constant(ir.VectorType(ir.IntType(32), _FLAGS), [0] * _FLAGS)
        mask = builder.shuffle_vector(one, ir.Constant(lanes, ir.Undefined), order)
        zero = ir.Constant(lanes, [0] * _FLAGS)
        differ = builder.icmp_unsigned("!=", loads[0], loads[1])
        nonzero = builder.icmp_unsigned("!=", builder.and_(builder.or_(*loads), mask), zero)
        return builder.bitcast(builder.and_(differ, nonzero), ir.IntType(64))

    return types.uint64(left, right, types.intp, left.dtype), generate


@intrinsic
def population(typing: Any, word: Any) -> Any:
    """How many bits of a word are set."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.uint64), generate


@intrinsic
def lowest_bit(typing: Any, word: Any) -> Any:
    """Index of the lowest set bit of a word; 64 for zero."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


@intrinsic
def floor_log2(typing: Any, word: Any) -> Any:
    """Index of the highest set bit of a word that is not zero."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zeros = builder.ctlz(args[0], ir.Constant(ir.IntType(1), 1))
        return builder.sub(ir.Constant(ir.IntType(64), 63), zeros)

    return types.uint64(types.uint64), generate


@intrinsic
def float_bits(typing: Any, value: Any) -> Any:
    """Bit pattern of a float32 or float64."""
    word = types.uint32 if value == types.float32 else types.uint64

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(word))

    return word(value), generate


@intrinsic
def bits_float(typing: Any, bits: Any) -> Any:
    """Float32 or float64 of a bit pattern."""
    real = types.float32 if bits == types.uint32 else types.float64

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(real))

    return real(bits), generate
