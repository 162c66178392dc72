"""Kernels on the entries of a matrix that are not zero, gathered once and used again and again."""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.codes.lanes import LANES
from ckptdiff.jit import Later, intrinsic, kernel
from ckptdiff.linalg.kernels.places import SOME, places_of
from ckptdiff.measure.kernels.tiles import Array

ir, types, arrayobj = Later("llvmlite.ir"), Later("numba.types"), Later("numba.np.arrayobj")

STEP = 16
"""Columns that are added at a time; there are a multiple of it."""


@intrinsic
def add_multiples(typing: Any, out: Any, to: Any, right: Any, places: Any, factors: Any, first: Any) -> Any:
    """Add multiples of rows of an array, in their order, to row `to` of another one; both are C-contiguous.

    They are taken from column `first` on, ``STEP`` wide. By itself the compiler checks whether the arrays overlap each
    time, which takes longer than to add.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        real = context.get_data_type(out.dtype)
        vector = ir.VectorType(real, STEP)

        def address(place: int, row: Any) -> Any:
            array = arrayobj.make_array(signature.args[place])(context, builder, args[place])
            at = builder.add(builder.mul(row, builder.extract_value(array.shape, 1)), args[5])
            return builder.bitcast(builder.gep(array.data, [at]), vector.as_pointer())

        target = address(0, args[1])
        products = []
        for number in range(len(places)):
            row = builder.load(address(2, builder.extract_value(args[3], number)))
            one = builder.insert_element(
                ir.Constant(vector, ir.Undefined), builder.extract_value(args[4], number), ir.IntType(32)(0)
            )
            factor = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), STEP), [0] * STEP))
            row.align = out.dtype.bitwidth // 8
            products.append(builder.fmul(factor, row))
        while len(products) > 1:
            products[:2] = [builder.fadd(*products[:2])]
        held = builder.load(target)
        held.align = out.dtype.bitwidth // 8
        total = builder.fadd(held, products[0])
        builder.store(total, target).align = out.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(out, types.intp, right, types.UniTuple(types.intp, len(places)), factors, types.intp), generate


@kernel
def gather_nonzeros(matrix: Array, columns: Array, values: Array, ends: Array) -> None:
    """List the entries of a matrix that are not zero, row by row.

    Parameters
    ----------
    matrix : float array, shape (rows, width)
    columns : int32 array, shape (size,)
    values : float array, shape (size,)
        Written to, as many as there are.
    ends : int64 array, shape (rows,)
        Written to: how many there are up to the end of each row.
    """
    found = 0
    flags, places = np.zeros(SOME, np.uint8), np.empty(SOME + LANES, np.uint16)
    for i in range(matrix.shape[0]):
        for first in range(0, matrix.shape[1], SOME):
            row = matrix[i, first : first + SOME]
            for j in range(row.size):
                flags[j] = row[j] != 0
            flags[row.size :] = 0
            count = places_of(flags, row.size, places)
            for n in range(count):
                columns[found + n], values[found + n] = first + places[n], row[places[n]]
            found += count
        ends[i] = found


@kernel
def add_squared_product(columns: Array, values: Array, ends: Array, right: Array, row: Array, out: Array) -> None:
    """Add ``d.T @ (d @ right)``, for the d that :func:`gather_nonzeros` lists.

    Parameters
    ----------
    right, out : float arrays, shape (width, count)
        C-contiguous, of the dtype of `values`; the count is a multiple of ``STEP``.
    row : float array, shape (1, count)
        Room.
    """
    first = 0
    for i in range(ends.size):
        stop = ends[i]
        row[:] = 0
        whole = stop - (stop - first) % 4
        for n in range(first, whole, 4):
            places = columns[n], columns[n + 1], columns[n + 2], columns[n + 3]
            factors = values[n], values[n + 1], values[n + 2], values[n + 3]
            for j in range(0, right.shape[1], STEP):
                add_multiples(row, 0, right, places, factors, j)
        for n in range(whole, stop):
            for j in range(0, right.shape[1], STEP):
                add_multiples(row, 0, right, (columns[n],), (values[n],), j)
        for n in range(first, stop):
            for j in range(0, right.shape[1], STEP):
                add_multiples(out, columns[n], row, (0,), (values[n],), j)
        first = stop
