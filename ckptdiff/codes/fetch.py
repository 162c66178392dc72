"""Fetch the bytes of a span into compiled code: by reads of the file itself, or from memory.

Kernels read in pieces that stay in the cache of their core until they are measured, without going back to Python
between them: its overhead would cost as much as the reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ckptdiff.jit import Later, helper, intrinsic

ir, types = Later("llvmlite.ir"), Later("numba.types")
arrayobj, cgutils = Later("numba.np.arrayobj"), Later("numba.core.cgutils")

FETCH = 1 << 17
"""Coordinates that are fetched at a time; divides ``BLOCK``."""

FIRST, FILE, AT = 0, 1, 2
"""Columns of runs: the coordinate of the span where one begins, the descriptor of an open file, and the byte of it
where that coordinate lies. A run ends where the next one begins."""
MEMORY = -1
"""In place of a descriptor: ``AT`` is an address."""

ATTEMPTS = 64
_ALIGNED = 8
"""Bytes that an address must be a multiple of, or what lies there is copied first."""

Array = Any


class Side(NamedTuple):
    """One side of a span of coordinates."""

    runs: Array
    """Where they lie: int64, shape (k, 3), columns ``FIRST``, ``FILE``, ``AT``; none if they are what the other side
    has just read into the same room."""
    room: Array
    """For ``FETCH`` coordinates; read-only to Numba. Its address is a multiple of 8."""
    itemsize: int
    """Bytes of a stored element."""


@intrinsic
def read_at(typing: Any, descriptor: Any, buffer: Any, start: Any, size: Any, offset: Any) -> Any:
    """POSIX pread into a uint8 array, shape (bytes,), from byte ``start`` on; also if Numba takes it for read-only."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, word = ir.IntType(8).as_pointer(), ir.IntType(64)
        function = builder.module.globals.get("pread")
        if function is None:
            function = ir.Function(
                builder.module, ir.FunctionType(word, [ir.IntType(32), pointer, word, word]), "pread"
            )
        data = arrayobj.make_array(signature.args[1])(context, builder, args[1]).data
        address = builder.gep(data, [args[2]])
        return builder.call(function, [builder.trunc(args[0], ir.IntType(32)), address, args[3], args[4]])

    return types.int64(types.int64, buffer, types.int64, types.int64, types.int64), generate


@intrinsic
def copy_from(typing: Any, address: Any, buffer: Any, start: Any, size: Any) -> Any:
    """Copy memory into a uint8 array, shape (bytes,), from byte ``start`` on; also if Numba takes it for read-only."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = arrayobj.make_array(signature.args[1])(context, builder, args[1]).data
        source = builder.inttoptr(args[0], data.type)
        cgutils.raw_memcpy(builder, builder.gep(data, [args[2]]), source, args[3], 1)
        return context.get_dummy_value()

    return types.void(types.int64, buffer, types.int64, types.int64), generate


@intrinsic
def memory_at(typing: Any, address: Any, size: Any, like: Any) -> Any:
    """Memory that someone else keeps alive, as an array of the type of ``like``, shape (size,)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = arrayobj.make_array(signature.return_type)(context, builder)
        data = builder.inttoptr(args[0], array.data.type)
        step = context.get_constant(types.intp, context.get_abi_sizeof(array.data.type.pointee))
        arrayobj.populate_array(array, data=data, shape=[args[1]], strides=[step], itemsize=step, meminfo=None)
        return array._getvalue()

    return like(types.int64, types.int64, like), generate


@helper
def fetch(side: Side, first: int, stop: int) -> Array:
    """Raw bytes of coordinates ``first`` to ``stop`` - 1 of a span; fewer if a file could not be read.

    Why not is for the caller to find out: compiled code knows no exceptions worth showing.
    """
    runs, size = side.runs, side.itemsize
    wanted = (stop - first) * size
    if len(runs) == 0:
        return side.room[:wanted]
    row = 0
    while row + 1 < len(runs) and runs[row + 1, FIRST] <= first:
        row += 1
    done = 0
    while True:
        end = wanted if row + 1 == len(runs) else min(wanted, (runs[row + 1, FIRST] - first) * size)
        at = runs[row, AT] + (first - runs[row, FIRST]) * size
        if runs[row, FILE] == MEMORY:
            if end - done == wanted and at % _ALIGNED == 0:
                return memory_at(at, wanted, side.room)
            copy_from(at + done, side.room, done, end - done)
            done = end
        attempts = 0
        while done < end and attempts < ATTEMPTS:
            count = read_at(runs[row, FILE], side.room, done, end - done, at + done)
            if count > 0:
                done += count
            else:  # a signal interrupts once; whatever else is wrong stays wrong
                attempts += 1
        if done < end or end == wanted:
            return side.room[:done]
        row += 1
