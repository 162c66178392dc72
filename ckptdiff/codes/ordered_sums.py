"""Add up values of contiguous arrays in float64, in an order that does not depend on the processor.

Sixteen sums are kept apart, of every sixteenth term each. Of their four fours the first two are added, the last two,
and the results; of the four sums that are left the first and third, the second and fourth, and the results. What is
too short for sixteen goes on in fours in the same way, of which the first sum starts from what came before, and the
last one to three terms are added one by one. It is the order that LLVM chooses for Intel's processors with AVX-512 if
it may. Here each step is written out, and every processor takes it, with the registers that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ckptdiff.codes.lanes import filled, part_of
from ckptdiff.jit import Later, intrinsic

ir, types = Later("llvmlite.ir"), Later("numba.types")
arrayobj, cgutils = Later("numba.np.arrayobj"), Later("numba.core.cgutils")

STAGES = (4, 4), (4, 1), (1, 1)
"""Sums to a vector and vectors, one stage after the other for what is left of an array."""
_KEPT = 8
"""Vectors of sums that a loop keeps in registers, of which AVX2 has sixteen."""
_NEAR = 1 << 11
"""Elements that one loop after the other takes, from the caches."""


def _added_up(builder: Any, vectors: list[Any]) -> Any:
    """What the elements of one, two or four vectors add up to."""
    while len(vectors) > 1:
        vectors = [builder.fadd(*vectors[k : k + 2]) for k in range(0, len(vectors), 2)]
    (total,) = vectors
    while total.type.count > 1:
        half = total.type.count // 2
        total = builder.fadd(part_of(builder, total, range(half)), part_of(builder, total, range(half, 2 * half)))
    return builder.extract_element(total, ir.IntType(32)(0))


def _sums(
    context: Any, builder: Any, kinds: Any, arrays: Any, count: int, terms_of: Callable[..., Sequence[Any]]
) -> list[Any]:
    """So many sums over arrays of shape (n,), of the terms that a function makes of vectors of their elements.

    Floats are given as float64. Where float32 holds them all, their products are exact: to multiply and add at once, as
    some processors can, changes no digit, and the flags that the function is given allow it.
    """
    made = [arrayobj.make_array(kind)(context, builder, array) for kind, array in zip(kinds, arrays, strict=True)]
    exact = () if types.float64 in [kind.dtype for kind in kinds] else ("contract",)
    size, double = builder.extract_value(made[0].shape, 0), ir.DoubleType()
    start, totals = size.type(0), [double(0.0)] * count
    for lanes, vectors in STAGES:
        reals, at_once = ir.VectorType(double, lanes), min(vectors, _KEPT // count)
        stop = builder.and_(size, size.type(-lanes * vectors))
        firsts = [builder.insert_element(reals([0.0] * lanes), total, ir.IntType(32)(0)) for total in totals]
        rooms = [[cgutils.alloca_once_value(builder, first) for first in firsts] for _ in range(vectors)]
        with cgutils.for_range_slice(builder, start, stop, size.type(_NEAR)) as (near, _):
            end = builder.add(near, size.type(_NEAR))
            end = builder.select(builder.icmp_signed("<", end, stop), end, stop)
            for some in range(0, vectors, at_once):
                with cgutils.for_range_slice(builder, near, end, size.type(lanes * vectors)) as (at, _):
                    for k in range(some, some + at_once):
                        place = builder.add(at, size.type(lanes * k))
                        terms = terms_of(builder, exact, *_vectors(builder, kinds, made, place, reals))
                        for room, term in zip(rooms[k], terms, strict=True):
                            builder.store(builder.fadd(builder.load(room), term, flags=exact), room)
        totals = [_added_up(builder, list(map(builder.load, of_one))) for of_one in zip(*rooms, strict=True)]
        start = stop
    return totals


def _vectors(builder: Any, kinds: Any, arrays: Any, at: Any, reals: Any) -> Iterator[Any]:
    """Elements of arrays from a place on, float32 as float64."""
    for kind, array in zip(kinds, arrays, strict=True):
        loaded = ir.VectorType(array.data.type.pointee, reals.count)
        place = builder.bitcast(builder.gep(array.data, [at]), loaded.as_pointer())
        vector = builder.load(place, align=kind.dtype.bitwidth // 8)
        yield builder.fpext(vector, reals) if kind.dtype == types.float32 else vector


@intrinsic
def sum_of_squares(typing: Any, values: Any) -> Any:
    """Sum of squares, of shape (n,)."""

    def square(builder: Any, exact: Any, value: Any) -> list[Any]:
        return [builder.fmul(value, value, flags=exact)]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _sums(context, builder, signature.args, args, 1, square)[0]

    return types.float64(values), generate


@intrinsic
def sums_of_changes(typing: Any, base: Any, delta: Any) -> Any:
    """Sums of d, |d|, d^2 and base d, of a base and a d of shape (n,)."""

    def terms(builder: Any, exact: Any, x: Any, d: Any) -> list[Any]:
        bits = ir.VectorType(ir.IntType(64), d.type.count)
        size = builder.bitcast(builder.and_(builder.bitcast(d, bits), filled(bits, (1 << 63) - 1)), d.type)
        return [d, size, builder.fmul(d, d, flags=exact), builder.fmul(x, d, flags=exact)]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums = _sums(context, builder, signature.args, args, 4, terms)
        return context.make_tuple(builder, signature.return_type, sums)

    return types.UniTuple(types.float64, 4)(base, delta), generate


@intrinsic
def sums_of_absorbed(typing: Any, x: Any, y: Any, a: Any, b: Any) -> Any:
    """Sums of squares of d = y - x, and of those d whose codes a and b are equal, or both zero; all of shape (n,)."""

    def terms(builder: Any, exact: Any, x: Any, y: Any, a: Any, b: Any) -> list[Any]:
        d = builder.fsub(y, x)  # which float32 need not hold
        square = builder.fmul(d, d)
        size = builder.and_(builder.or_(a, b), filled(a.type, (1 << a.type.element.width - 1) - 1))
        zeros = builder.icmp_unsigned("==", size, filled(a.type, 0))
        equal = builder.or_(builder.icmp_unsigned("==", a, b), zeros)
        return [square, builder.select(equal, square, d.type([0.0] * d.type.count))]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums = _sums(context, builder, signature.args, args, 2, terms)
        return context.make_tuple(builder, signature.return_type, sums)

    return types.UniTuple(types.float64, 2)(x, y, a, b), generate
