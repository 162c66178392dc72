"""Keep sixty-four differences in registers, as float64, and multiply them with others.

Products of differences that float32 holds are exact in float64, so that their sums have the same digits whether or not
a processor multiplies and adds at once. Others are multiplied first, on every processor.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ckptdiff.codes.lanes import LANES, SUMS, part_of, values_of_codes
from ckptdiff.jit import Later, intrinsic

ir, types, arrayobj = Later("llvmlite.ir"), Later("numba.types"), Later("numba.np.arrayobj")
lane_types = Later("ckptdiff.codes.lane_types")

PRODUCT_SUMS = 8
"""Sums of products that are kept apart."""


@intrinsic
def differences(typing: Any, base: Any, codes: Any) -> Any:
    """Sixty-four differences from the base, taken in float32 of bfloat16 codes and in float64 of wider ones."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = ir.VectorType(ir.DoubleType(), SUMS)
        parts = []
        for left, right in zip(*(values_of_codes(builder, codes) for codes in args), strict=True):
            delta = builder.fsub(right, left)
            parts.append(delta if delta.type == wide else builder.fpext(delta, wide))
        order = ir.Constant(ir.VectorType(ir.IntType(32), LANES), list(range(LANES)))
        return builder.shuffle_vector(*parts, order)

    return lane_types.Reals(codes.bits == 16)(base, codes), generate


def _parts_at(context: Any, builder: Any, array_type: Any, array: Any, row: Any, columns: int) -> Any:
    """Where a row of a float64 array begins, of shape (rows, columns), as a pointer to vectors of PRODUCT_SUMS."""
    data = arrayobj.make_array(array_type)(context, builder, array).data
    start = builder.gep(data, [builder.mul(row, ir.Constant(row.type, columns))])
    return builder.bitcast(start, ir.VectorType(ir.DoubleType(), PRODUCT_SUMS).as_pointer())


@intrinsic
def put_reals(typing: Any, room: Any, row: Any, reals: Any) -> Any:
    """Write sixty-four values to a row of a float64 array, shape (rows, LANES)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = _parts_at(context, builder, signature.args[0], args[0], args[1], LANES)
        builder.store(args[2], builder.bitcast(start, args[2].type.as_pointer())).align = 8
        return context.get_dummy_value()

    return types.void(room, types.intp, reals), generate


def _add_products(context: Any, builder: Any, signature: Any, args: Any, squared: bool) -> Any:
    sums, row, reals, room, other = args
    total_at = _parts_at(context, builder, signature.args[0], sums, row, PRODUCT_SUMS)
    start = _parts_at(context, builder, signature.args[3], room, other, LANES)
    total = builder.load(total_at, align=8)
    exact = ("contract",) if signature.args[2].single and not squared else ()
    for part in range(LANES // PRODUCT_SUMS):
        ours = part_of(builder, reals, range(part * PRODUCT_SUMS, (part + 1) * PRODUCT_SUMS))
        theirs = builder.load(builder.gep(start, [ir.IntType(64)(part)]), align=8)
        product = builder.fmul(ours, theirs, flags=exact)
        if squared:
            product = builder.fmul(product, product)
        total = builder.fadd(total, product, flags=exact)
    builder.store(total, total_at, align=8)
    return context.get_dummy_value()


@intrinsic
def add_products(typing: Any, sums: Any, row: Any, reals: Any, room: Any, other: Any) -> Any:
    """Add products of values with those of a row of `room` to a row of sums, shape (rows, PRODUCT_SUMS)."""
    return types.void(sums, types.intp, reals, room, types.intp), partial(_add_products, squared=False)


@intrinsic
def add_squared_products(typing: Any, sums: Any, row: Any, reals: Any, room: Any, other: Any) -> Any:
    """The same with the squares of the products."""
    return types.void(sums, types.intp, reals, room, types.intp), partial(_add_products, squared=True)
