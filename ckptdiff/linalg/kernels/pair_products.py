"""Kernels for the Gram matrix of bfloat16 values, two products at a time where the processor has such an instruction.

VDPBF16PS multiplies sixteen pairs of bfloat16 values with another sixteen and adds both products of a pair to a float32
sum: twice as many in a cycle as with float32, and no digit is lost, since products of bfloat16 are float32 values.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.codes.lanes import everywhere, filled
from ckptdiff.jit import Later, intrinsic, kernel
from ckptdiff.measure.kernels.tiles import Array

ir, types = Later("llvmlite.ir"), Later("numba.types")
arrayobj, cgutils = Later("numba.np.arrayobj"), Later("numba.core.cgutils")
kernel_cache = Later("ckptdiff.kernel_cache")

BLOCK = 16
"""Columns that are packed together."""
ROWS, COLUMNS = 8, 2 * BLOCK
"""Of the part of a Gram matrix that is added up in registers at a time."""
FEATURE = "+avx512bf16"
"""How LLVM names those instructions."""
_TOGETHER = 128
"""Pairs in a row that are added up by themselves: the fewer, the smaller the error."""
_CACHED = 512
"""Pairs after which columns begin anew; a block of so many takes 32 KiB."""
_INSTRUCTION = "llvm.x86.avx512bf16.dpbf16ps.512"


def _multiplier(builder: Any) -> Any:
    """A function that adds the products of pairs, sixteen words each, to float32 sums."""
    words, reals = ir.VectorType(ir.IntType(32), BLOCK), ir.VectorType(ir.FloatType(), BLOCK)
    if FEATURE in kernel_cache.processor_features().split(","):
        known = builder.module.globals.get(_INSTRUCTION)
        instruction = known or ir.Function(builder.module, ir.FunctionType(reals, [reals, words, words]), _INSTRUCTION)
        return lambda sums, left, right: builder.call(instruction, [sums, left, right])

    def multiply(sums: Any, *sides: Any) -> Any:
        upper = [builder.bitcast(builder.and_(side, filled(words, 0xFFFF_0000)), reals) for side in sides]
        lower = [builder.bitcast(builder.shl(side, filled(words, 16)), reals) for side in sides]
        return builder.fadd(builder.fadd(sums, builder.fmul(*upper)), builder.fmul(*lower))

    return multiply


@intrinsic
def add_pairs(
    typing: Any, out: Any, row: Any, column: Any, packed: Any, left: Any, lane: Any, right: Any, first: Any, stop: Any
) -> Any:
    """Add inner products of ``ROWS`` columns and ``COLUMNS`` others to a part of a float32 array.

    That part begins at a row and a column. Packed columns are those of block `left` from lane `lane` on, and those of
    the two blocks from `right` on; pairs of rows `first` to ``stop - 1`` are taken.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole, step = ir.IntType(64), ir.Constant(args[7].type, _TOGETHER)
        words, reals = ir.VectorType(ir.IntType(32), BLOCK), ir.VectorType(ir.FloatType(), BLOCK)
        to, codes = (arrayobj.make_array(signature.args[k])(context, builder, args[k]) for k in (0, 3))
        size = builder.mul(builder.extract_value(codes.shape, 1), whole(BLOCK))
        ours = builder.gep(codes.data, [builder.add(builder.mul(args[4], size), args[5])])
        theirs = [builder.gep(codes.data, [builder.mul(builder.add(args[6], whole(k)), size)]) for k in range(2)]
        multiply, zeros = _multiplier(builder), ir.Constant(reals, [0.0] * BLOCK)
        places = [(r, k) for r in range(ROWS) for k in range(2)]
        totals, sums = ([cgutils.alloca_once_value(builder, zeros) for _ in places] for _ in range(2))
        with cgutils.for_range_slice(builder, args[7], args[8], step, step.type) as (start, _):
            for held in sums:
                builder.store(zeros, held)
            end = builder.add(start, step)
            end = builder.select(builder.icmp_signed("<", end, args[8]), end, args[8])
            with cgutils.for_range_slice(builder, start, end, step.type(1), step.type) as (pair, _):
                at = builder.mul(pair, whole(BLOCK))
                loaded = []
                for block in theirs:
                    loaded.append(builder.load(builder.bitcast(builder.gep(block, [at]), words.as_pointer())))
                    loaded[-1].align = 64
                for r in range(ROWS):
                    pairs = everywhere(builder, builder.load(builder.gep(ours, [builder.add(at, whole(r))])), words)
                    for k in range(2):
                        held = sums[places.index((r, k))]
                        builder.store(multiply(builder.load(held), pairs, loaded[k]), held)
            for total, held in zip(totals, sums, strict=True):
                builder.store(builder.fadd(builder.load(total), builder.load(held)), total)
        line = builder.extract_value(to.shape, 1)
        for (r, k), total in zip(places, totals, strict=True):
            start = builder.gep(to.data, [builder.mul(builder.add(args[1], whole(r)), line)])
            address = builder.gep(start, [builder.add(args[2], whole(k * BLOCK))])
            address = builder.bitcast(address, reals.as_pointer())
            before = builder.load(address)
            before.align = 4
            builder.store(builder.fadd(before, builder.load(total)), address).align = 4
        return context.get_dummy_value()

    return types.void(out, *[types.intp] * 2, packed, *[types.intp] * 5), generate


@kernel
def pack_pairs(codes: Array, packed: Array, first: Any, stop: Any) -> bool:
    """Pack some columns of float32 values as bfloat16, if they are; returns whether all of them are.

    Parameters
    ----------
    codes : uint32 array, shape (rows, columns)
        Codes of the values.
    packed : uint32 array, shape (blocks, pairs, ``BLOCK``)
        Written to: of each column and each two rows both values, the first one in the lower half. There is room for
        one more row, and for the columns of the last block, which are zeros if they are not there.
    first, stop : int64
        Blocks that are packed.
    """
    rows, columns = codes.shape
    lower, upper = np.uint32(0xFFFF), np.uint32(0xFFFF_0000)
    for block in range(first, stop):
        begin, lost = block * BLOCK, np.uint32(0)
        width = min(BLOCK, max(columns - begin, 0))
        for pair in range(packed.shape[1]):
            for j in range(width):
                above = codes[2 * pair, begin + j]
                below = codes[2 * pair + 1, begin + j] if 2 * pair + 1 < rows else np.uint32(0)
                lost |= (above | below) & lower
                packed[block, pair, j] = (above >> np.uint32(16)) | (below & upper)
            packed[block, pair, width:] = 0
        if lost:
            return False
    return True


@kernel
def add_packed_gram(total: Array, packed: Array, first: Any, stop: Any, room: Array) -> None:
    """Add the Gram matrix of packed columns to the lower triangle of `total`.

    Parameters
    ----------
    total : float32 array, shape (columns, columns)
    packed : uint32 array, shape (blocks, pairs, ``BLOCK``)
        From :func:`pack_pairs`, with an even number of blocks.
    first, stop : int64
        Blocks whose rows of the total are added to, the first one even.
    room : float32 array, shape (``ROWS``, ``COLUMNS``)
    """
    columns = total.shape[0]
    for begin in range(0, packed.shape[1], _CACHED):
        end = min(begin + _CACHED, packed.shape[1])
        for right in range(0, stop, 2):
            for left in range(max(first, right), stop):
                for lane in range(0, BLOCK, ROWS):
                    row, column = left * BLOCK + lane, right * BLOCK
                    if row + ROWS <= columns and column + COLUMNS <= row + 1:
                        add_pairs(total, row, column, packed, left, lane, right, begin, end)
                        continue
                    room[:] = 0
                    add_pairs(room, 0, 0, packed, left, lane, right, begin, end)
                    for i in range(row, min(row + ROWS, columns)):
                        for j in range(column, min(column + COLUMNS, i + 1)):
                            total[i, j] += room[i - row, j - column]
