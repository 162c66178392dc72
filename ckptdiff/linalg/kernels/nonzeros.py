"""Kernels on the entries of a matrix that are not zero: list them by rows or by columns, and multiply with a list."""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.codes.lanes import LANES, everywhere
from ckptdiff.jit import Later, intrinsic, kernel
from ckptdiff.linalg.kernels.places import SOME, places_of
from ckptdiff.measure.kernels.tiles import Array

ir, types = Later("llvmlite.ir"), Later("numba.types")
arrayobj, cgutils = Later("numba.np.arrayobj"), Later("numba.core.cgutils")

_VECTOR, _VECTORS = 64, 2
STRIP = _VECTOR * _VECTORS
"""Bytes of a row that are added up in registers at a time; 2,048 such rows stay in the second cache."""


@intrinsic
def add_up(typing: Any, line: Any, right: Any, places: Any, values: Any, first: Any, stop: Any) -> Any:
    """Write the sum of rows of an array to a line, ``STRIP`` bytes wide both, each times a value.

    They are those of ``places[first:stop]``, added in their order, and times ``values[first:stop]``.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        count, whole = _VECTOR * 8 // line.dtype.bitwidth, ir.IntType(64)
        vector = ir.VectorType(context.get_data_type(line.dtype), count)
        to, rows, at, factors = (
            arrayobj.make_array(signature.args[k])(context, builder, args[k]).data for k in range(4)
        )

        def part(start: Any, number: int) -> Any:
            address = builder.gep(start, [whole(number * count)])
            return builder.bitcast(address, vector.as_pointer())

        sums = [cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * count)) for _ in range(_VECTORS)]
        one = ir.Constant(args[4].type, 1)
        with cgutils.for_range_slice(builder, args[4], args[5], one, one.type) as (n, _):
            factor = everywhere(builder, builder.load(builder.gep(factors, [n])), vector)
            row = builder.mul(builder.zext(builder.load(builder.gep(at, [n])), whole), whole(count * _VECTORS))
            start = builder.gep(rows, [row])
            for number, total in enumerate(sums):
                read = builder.load(part(start, number))
                read.align = line.dtype.bitwidth // 8
                builder.store(builder.fadd(builder.load(total), builder.fmul(factor, read)), total)
        for number, total in enumerate(sums):
            builder.store(builder.load(total), part(to, number)).align = line.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(line, right, places, values, types.intp, types.intp), generate


@kernel
def list_rows(matrix: Array, places: Array, values: Array, ends: Array) -> None:
    """List the entries of a matrix that are not zero, row by row.

    Parameters
    ----------
    matrix : float array, shape (rows, at most 65,536)
    places : uint16 array, shape (size,)
        Written to, as many as there are: the column of each.
    values : float array, shape (size,)
        Written to as well.
    ends : int64 array, shape (rows,)
        Written to: how many there are up to the end of each row.
    """
    found = 0
    flags, some = np.zeros(SOME, np.uint8), np.empty(SOME + LANES, np.uint16)
    for i in range(matrix.shape[0]):
        for first in range(0, matrix.shape[1], SOME):
            row = matrix[i, first : first + SOME]
            for j in range(row.size):
                flags[j] = row[j] != 0
            flags[row.size :] = 0
            count = places_of(flags, row.size, some)
            for n in range(count):
                places[found + n], values[found + n] = first + some[n], row[some[n]]
            found += count
        ends[i] = found


@kernel
def list_columns(matrix: Array, begin: Any, places: Array, values: Array, ends: Array) -> None:
    """List the same column by column, of as many columns as there are ends, from `begin` on.

    The matrix has 65,536 rows at most, and places are rows.
    """
    width = ends.size
    following, flags, some = np.zeros(width, np.int64), np.zeros(SOME, np.uint8), np.empty(SOME + LANES, np.uint16)
    for i in range(matrix.shape[0]):
        row = matrix[i, begin : begin + width]
        for j in range(width):
            following[j] += row[j] != 0
    found = 0
    for j in range(width):
        found += following[j]
        ends[j] = found
        following[j] = found - following[j]
    for i in range(matrix.shape[0]):
        for first in range(0, width, SOME):
            row = matrix[i, begin + first : begin + min(first + SOME, width)]
            for j in range(row.size):
                flags[j] = row[j] != 0
            flags[row.size :] = 0
            for place in some[: places_of(flags, row.size, some)]:
                at = following[first + place]
                places[at], values[at] = i, row[place]
                following[first + place] = at + 1


@kernel
def add_listed_product(
    places: Array, values: Array, ends: Array, strips: Array, most: Any, line: Array, out: Array
) -> None:
    """Add a product of a listed matrix and another one, both and their sum of one dtype.

    Parameters
    ----------
    places, values, ends : arrays
        From :func:`list_rows`, or of the transposed matrix from :func:`list_columns`.
    strips : float array, shape (strips, inner, ``STRIP`` bytes)
        The other matrix, so many of its columns after the other: close together they stay in the cache while all rows
        pass.
    most : int64
        So many columns of the first row are added to, and one more of each row after it, as in a lower triangle.
    line : float array, shape (1, ``STRIP`` bytes)
        Room.
    out : float array, shape (rows, columns)
    """
    width = strips.shape[2]
    for strip in range(strips.shape[0]):
        first = strip * width
        columns = min(width, out.shape[1] - first)
        begin = max(first + 1 - most, 0)
        start = ends[begin - 1] if begin else 0
        for i in range(begin, ends.size):
            add_up(line, strips[strip], places, values, start, ends[i])
            for j in range(min(columns, most + i - first)):
                out[i, first + j] += line[0, j]
            start = ends[i]
