"""Do bit tricks that Numba lacks: flags in words, highest set bit, bits of a float, sixteen floats alike.

Each is portable LLVM IR, so the same source becomes one or two instructions with AVX-512, a few with AVX2 or NEON.
"""

from __future__ import annotations

from typing import Any

from ckptdiff.jit import Later, intrinsic

ir, types, arrayobj = Later("llvmlite.ir"), Later("numba.types"), Later("numba.np.arrayobj")

_FLAGS = 64


@intrinsic
def pack64(typing: Any, flags: Any, start: Any) -> Any:
    """Word whose bit k is set where the byte ``flags[start + k]`` is not zero; flags of shape (start + 64,) or more."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = arrayobj.make_array(signature.args[0])(context, builder, args[0])
        vector = ir.VectorType(ir.IntType(8), _FLAGS)
        address = builder.gep(array.data, [args[1]])
        load = builder.load(builder.bitcast(address, vector.as_pointer()))
        load.align = 1
        return builder.bitcast(builder.icmp_unsigned("!=", load, ir.Constant(vector, [0] * _FLAGS)), ir.IntType(64))

    return types.uint64(flags, types.intp), generate


@intrinsic
def unpack64(typing: Any, word: Any, flags: Any, start: Any) -> Any:
    """Set the byte ``flags[start + k]`` to bit k of a word; flags of shape (start + 64,) or more."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = arrayobj.make_array(signature.args[1])(context, builder, args[1])
        vector = ir.VectorType(ir.IntType(8), _FLAGS)
        address = builder.gep(array.data, [args[2]])
        bits = builder.bitcast(args[0], ir.VectorType(ir.IntType(1), _FLAGS))
        builder.store(builder.zext(bits, vector), builder.bitcast(address, vector.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(types.uint64, flags, types.intp), generate


@intrinsic
def fill16(typing: Any, out: Any, start: Any, value: Any) -> Any:
    """Set ``out[start]`` to ``out[start + 15]``, of shape (start + 16,) or more, to a float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = arrayobj.make_array(signature.args[0])(context, builder, args[0])
        vector, lane = ir.VectorType(ir.FloatType(), 16), ir.IntType(32)
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), args[2], lane(0))
        everywhere = ir.Constant(ir.VectorType(lane, 16), [0] * 16)
        filled = builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), everywhere)
        address = builder.bitcast(builder.gep(array.data, [args[1]]), vector.as_pointer())
        builder.store(filled, address).align = 4
        return context.get_dummy_value()

    return types.void(out, types.intp, types.float32), generate


@intrinsic
def population(typing: Any, word: Any) -> Any:
    """How many bits of a word are set."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.uint64), generate


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
