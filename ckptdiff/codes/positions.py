"""Gather marked codes by their positions, for processors that cannot pack lanes; portable LLVM IR as in ``lanes``."""

from __future__ import annotations

from typing import Any

from ckptdiff.codes.lanes import LANES, part_of
from ckptdiff.jit import Later, intrinsic

ir, types, arrayobj = Later("llvmlite.ir"), Later("numba.types"), Later("numba.np.arrayobj")

EIGHT = 8
"""Bits and codes that are treated at a time."""

_OCTETS = [([k for k in range(EIGHT) if octet >> k & 1] + [0] * EIGHT)[:EIGHT] for octet in range(256)]
"""Of each byte, which of its bits are set; what follows means nothing."""


@intrinsic
def put_positions(typing: Any, word: Any, first: Any, found: Any, at: Any) -> Any:
    """Write ``first`` + k for each bit k that is set in ``word`` to ``found[at:]``; returns where the next ones go.

    Up to 64 entries of ``found``, uint16 of shape (at + 64,) or more, are overwritten. It takes as long for any word:
    eight bits at a time by a table, without a branch that the processor could guess wrong.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word, first, _, at = args
        data = arrayobj.make_array(signature.args[2])(context, builder, args[2]).data
        octet, eight = (ir.VectorType(ir.IntType(bits), EIGHT) for bits in (8, 16))
        table = builder.module.globals.get("ckptdiff.octets")
        if table is None:
            rows = ir.ArrayType(octet, len(_OCTETS))
            table = ir.GlobalVariable(builder.module, rows, "ckptdiff.octets")
            table.linkage, table.global_constant = "private", True
            table.initializer = ir.Constant(rows, [ir.Constant(octet, row) for row in _OCTETS])
        start = builder.trunc(first, eight.element)
        everywhere = builder.insert_element(ir.Constant(eight, ir.Undefined), start, ir.IntType(32)(0))
        everywhere = part_of(builder, everywhere, [0] * EIGHT)
        for low in range(0, LANES, EIGHT):
            bits = builder.and_(builder.lshr(word, word.type(low)), word.type(0xFF))
            row = builder.zext(builder.load(builder.gep(table, [word.type(0), bits], inbounds=True)), eight)
            positions = builder.add(row, builder.add(everywhere, ir.Constant(eight, [low] * EIGHT)))
            builder.store(positions, builder.bitcast(builder.gep(data, [at]), eight.as_pointer())).align = 2
            at = builder.add(at, builder.zext(builder.ctpop(builder.trunc(bits, octet.element)), at.type))
        return at

    return types.intp(types.uint64, types.intp, found, types.intp), generate


@intrinsic
def take_eight(typing: Any, left: Any, right: Any, positions: Any, packed: Any, others: Any, at: Any) -> Any:
    """Write the codes of both sides at eight positions, ``positions[at:]``, to ``packed[at:]`` and ``others[at:]``.

    Arrays of shape (n,), positions unsigned; none is checked. One store for eight codes, where loops make eight.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        *arrays, at = args
        data = [arrayobj.make_array(signature.args[k])(context, builder, array).data for k, array in enumerate(arrays)]
        where = [builder.load(builder.gep(data[2], [builder.add(at, at.type(k))])) for k in range(EIGHT)]
        for codes, out in ((data[0], data[3]), (data[1], data[4])):
            eight = ir.VectorType(codes.type.pointee, EIGHT)
            vector = ir.Constant(eight, ir.Undefined)
            for k, position in enumerate(where):
                code = builder.load(builder.gep(codes, [builder.zext(position, at.type)]))
                vector = builder.insert_element(vector, code, ir.IntType(32)(k))
            address = builder.bitcast(builder.gep(out, [at]), eight.as_pointer())
            builder.store(vector, address).align = left.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(left, right, positions, packed, others, types.intp), generate
