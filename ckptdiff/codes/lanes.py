"""Keep sixty-four codes in registers, for loops that a compiler would not keep there by itself.

Each step is portable LLVM IR on wide vectors, so the same source becomes a few instructions with AVX-512, twice as many
with AVX2, and more with NEON. Loops over them are plain Python for Numba.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptdiff.jit import Later, intrinsic

ir, types, arrayobj = Later("llvmlite.ir"), Later("numba.types"), Later("numba.np.arrayobj")
lane_types = Later("ckptdiff.codes.lane_types")

LANES = 64
SUMS = LANES // 2
"""Sums that are kept apart: two codes each."""

_ODD = 0x9E37_79B1
_REGISTER = 512
_LINE = 64


def filled(vector: Any, value: int) -> Any:
    """The same whole number in all lanes."""
    return ir.Constant(vector, [value] * vector.count)


def everywhere(builder: Any, value: Any, vector: Any) -> Any:
    """The same value in all lanes."""
    return part_of(builder, builder.insert_element(filled(vector, 0), value, ir.IntType(32)(0)), [0] * vector.count)


def part_of(builder: Any, vector: Any, lanes: Sequence[int]) -> Any:
    """Some lanes of a vector."""
    order = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), order)


def _lowest(codes: Any) -> Any:
    """The sign bit alone."""
    return filled(codes.type, -(1 << (codes.type.element.width - 1)))


def packs() -> bool:
    """Whether ``pack_lanes`` is a few instructions there; without them it would be slower than a loop over bits."""
    from ckptdiff.kernel_cache import processor_features

    versions = Later("llvmlite.binding").llvm_version_info
    return bool(versions >= (20,)) and "+avx512vbmi2" in processor_features().split(",")


def aligned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Room, not cleared, that begins where a cache line does: loads that cross lines take twice as long."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + _LINE, np.uint8)
    start = -room.ctypes.data % _LINE
    return room[start : start + size].view(dtype).reshape(shape)


@intrinsic
def load_codes(typing: Any, codes: Any, row: Any, start: Any) -> Any:
    """Codes ``start`` to ``start + 63`` of a row of an array, shape (rows, n)."""
    loaded = lane_types.Codes(codes.dtype.bitwidth)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = arrayobj.make_array(signature.args[0])(context, builder, args[0])
        at = builder.add(builder.mul(args[1], builder.extract_value(array.shape, 1)), args[2])
        vector = context.get_value_type(loaded)
        load = builder.load(builder.bitcast(builder.gep(array.data, [at]), vector.as_pointer()))
        load.align = 1
        return load

    return loaded(codes, types.intp, types.intp), generate


@intrinsic
def codes_at(typing: Any, address: Any, like: Any) -> Any:
    """The sixty-four codes at an address, each as wide as an element of the array `like`."""
    loaded = lane_types.Codes(like.dtype.bitwidth)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        load = builder.load(builder.inttoptr(args[0], context.get_value_type(loaded).as_pointer()))
        load.align = like.dtype.bitwidth // 8
        return load

    return loaded(types.int64, like), generate


@intrinsic
def put_codes(typing: Any, address: Any, codes: Any) -> Any:
    """Write sixty-four codes to an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], args[1].type.as_pointer())).align = codes.bits // 8
        return context.get_dummy_value()

    return types.void(types.int64, codes), generate


@intrinsic
def chosen(typing: Any, word: Any, codes: Any, others: Any) -> Any:
    """Codes whose bit in ``word`` is set, and the others elsewhere."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.bitcast(args[0], ir.VectorType(ir.IntType(1), LANES)), *args[1:])

    return codes(types.uint64, codes, others), generate


@intrinsic
def mixed(typing: Any, mix: Any, codes: Any) -> Any:
    """A checksum of sixty-four codes and of what was mixed before, of as many bits as the codes.

    No change of one code leaves it as it was. Each word of 32 bits is multiplied, and its upper half mixed into the
    lower one, as in MurmurHash (Appleby 2008): changes of signs, the uppermost bits, would cancel each other else.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words = ir.VectorType(ir.IntType(32), LANES * codes.bits // 32)
        left, right = (builder.bitcast(vector, words) for vector in args)
        product = builder.mul(builder.xor(left, right), filled(words, _ODD))
        return builder.bitcast(builder.xor(product, builder.lshr(product, filled(words, 15))), args[0].type)

    return codes(mix, codes), generate


@intrinsic
def no_codes(typing: Any, codes: Any) -> Any:
    """Zeros in place of the codes given."""
    return codes(codes), lambda context, builder, signature, args: filled(args[0].type, 0)


@intrinsic
def differing(typing: Any, left: Any, right: Any) -> Any:
    """Word whose bit k is set where codes k differ."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.icmp_unsigned("!=", *args), ir.IntType(LANES))

    return types.uint64(left, right), generate


@intrinsic
def changed_lanes(typing: Any, left: Any, right: Any, magnitude: Any) -> Any:
    """Word whose bit k is set where codes k differ and are not +0 and -0."""
    scalar = types.Integer.from_bitwidth(left.bits, signed=False)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        left, right, magnitude = args
        size = builder.and_(builder.or_(left, right), everywhere(builder, magnitude, left.type))
        changed = builder.and_(
            builder.icmp_unsigned("!=", left, right), builder.icmp_unsigned("!=", size, filled(left.type, 0))
        )
        return builder.bitcast(changed, ir.IntType(LANES))

    return types.uint64(left, right, scalar), generate


@intrinsic
def count_lanes(typing: Any, codes: Any, row: Any, magnitude: Any, counts: Any) -> Any:
    """Add one to the first row of ``counts``, shape (k, bins), at the magnitude of each code of a row of 64.

    ``codes`` is uint16 of shape (rows, 64). Four codes to a load and no loop: a core stores once a cycle, and all else
    has to keep up with that.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data, bins = (arrayobj.make_array(signature.args[k])(context, builder, args[k]).data for k in (0, 3))
        start = builder.gep(data, [builder.mul(args[1], ir.Constant(args[1].type, LANES))])
        words = builder.bitcast(start, args[2].type.as_pointer())
        one = ir.Constant(bins.type.pointee, 1)
        for k in range(LANES // 4):
            word = builder.load(builder.gep(words, [ir.IntType(64)(k)]))
            for shift in range(0, 64, 16):
                size = builder.and_(builder.lshr(word, word.type(shift)), args[2])
                address = builder.gep(bins, [size])
                builder.store(builder.add(builder.load(address), one), address)
        return context.get_dummy_value()

    return types.void(codes, types.intp, types.uint64, counts), generate


@intrinsic
def pack_lanes(typing: Any, codes: Any, word: Any, packed: Any, at: Any) -> Any:
    """Write the codes whose bit in ``word`` is set to ``packed[at:]``, side by side, and anything into what follows.

    Up to 64 entries from ``at`` on are overwritten, of shape (at + 64,) or more.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        codes, word, _, at = args
        data = arrayobj.make_array(signature.args[2])(context, builder, args[2]).data
        code = codes.type.element
        count = _REGISTER // code.width
        part, flags = ir.VectorType(code, count), ir.VectorType(ir.IntType(1), count)
        name = f"llvm.experimental.vector.compress.v{count}i{code.width}"
        compress = builder.module.globals.get(name)
        if compress is None:
            compress = ir.Function(builder.module, ir.FunctionType(part, [part, flags, part]), name)
        for first in range(0, LANES, count):
            bits = builder.trunc(builder.lshr(word, word.type(first)), ir.IntType(count))
            some = part_of(builder, codes, range(first, first + count))
            dense = builder.call(compress, [some, builder.bitcast(bits, flags), ir.Constant(part, ir.Undefined)])
            builder.store(dense, builder.bitcast(builder.gep(data, [at]), part.as_pointer())).align = code.width // 8
            at = builder.add(at, builder.zext(builder.ctpop(bits), at.type))
        return context.get_dummy_value()

    return types.void(codes, types.uint64, packed, types.intp), generate


@intrinsic
def positive_zeros(typing: Any, codes: Any, magnitude: Any) -> Any:
    """The same codes, but zero where all bits of the magnitude are."""
    scalar = types.Integer.from_bitwidth(codes.bits, signed=False)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zeros, mask = filled(args[0].type, 0), everywhere(builder, args[1], args[0].type)
        return builder.select(builder.icmp_unsigned("==", builder.and_(args[0], mask), zeros), zeros, args[0])

    return codes(codes, scalar), generate


@intrinsic
def lower(typing: Any, left: Any, right: Any) -> Any:
    """The lower of each two codes as signed integers: a sign bit alone is the lowest of all."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.icmp_signed("<", *args), *args)

    return left(left, right), generate


@intrinsic
def any_lowest(typing: Any, codes: Any) -> Any:
    """Whether any code is a sign bit alone."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = builder.bitcast(builder.icmp_unsigned("==", args[0], _lowest(args[0])), ir.IntType(LANES))
        return builder.icmp_unsigned("!=", found, ir.IntType(LANES)(0))

    return types.boolean(codes), generate


def values_of_codes(builder: Any, codes: Any) -> list[Any]:
    """Values of codes, in two vectors: float32 of bfloat16, float64 of float32 and float64."""
    width = codes.type.element.width
    if width == 16:  # two codes to a word: each is the upper half of a float32
        words, reals = (ir.VectorType(kind, SUMS) for kind in (ir.IntType(32), ir.FloatType()))
        pairs = builder.bitcast(codes, words)
        halves = builder.shl(pairs, filled(words, 16)), builder.and_(pairs, filled(words, 0xFFFF_0000))
        return [builder.bitcast(half, reals) for half in halves]
    doubles = ir.VectorType(ir.DoubleType(), LANES)
    if width == 32:
        wide = builder.fpext(builder.bitcast(codes, ir.VectorType(ir.FloatType(), LANES)), doubles)
    else:
        wide = builder.bitcast(codes, doubles)
    return [part_of(builder, wide, range(SUMS)), part_of(builder, wide, range(SUMS, LANES))]


@intrinsic
def add_squares(typing: Any, sums: Any, row: Any, base: Any, codes: Any) -> Any:
    """Add squared differences to a row of shape (rows, SUMS): float32 of bfloat16 codes, float64 of wider ones."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = arrayobj.make_array(signature.args[0])(context, builder, args[0])
        reals = ir.VectorType(context.get_data_type(signature.args[0].dtype), SUMS)
        address = builder.gep(array.data, [builder.mul(args[1], ir.Constant(args[1].type, SUMS))])
        address = builder.bitcast(address, reals.as_pointer())
        total = builder.load(address)
        total.align = signature.args[0].dtype.bitwidth // 8
        for left, right in zip(values_of_codes(builder, args[2]), values_of_codes(builder, args[3]), strict=True):
            delta = builder.fsub(right, left)
            total = builder.fadd(total, builder.fmul(delta, delta))  # not at once, which not all processors can
        builder.store(total, address).align = signature.args[0].dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(sums, types.intp, base, codes), generate
