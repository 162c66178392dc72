"""Fetch bytes into compiled code: from a window on mapped memory, or by reads of the file itself.

Kernels read the file in pieces that stay in the cache of their core until they are measured, without going back to
Python between them: its overhead would cost as much as the reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from ckptdiff.jit import helper

__all__ = ["FETCH", "SHARED", "WINDOW", "Array", "Side", "fetch"]

FETCH = 1 << 17
"""Coordinates that are fetched at a time; divides ``BLOCK``."""

WINDOW, SHARED = -1, -2
"""In place of a descriptor: the bytes are mapped; they are those that the other side has just fetched."""

_ATTEMPTS = 64

Array = Any


class Side(NamedTuple):
    """One side of a span of coordinates."""

    descriptor: int
    """Of the open file, or ``WINDOW``, or ``SHARED``."""
    offset: int
    """Where coordinate ``origin`` lies in the file."""
    origin: int
    """The first coordinate that can be fetched."""
    bytes: Array
    """The mapped bytes, or room for ``FETCH`` coordinates; read-only to Numba. Its address is a multiple of 8."""
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
        data = make_array(signature.args[1])(context, builder, args[1]).data
        address = builder.gep(data, [args[2]])
        return builder.call(function, [builder.trunc(args[0], ir.IntType(32)), address, args[3], args[4]])

    return types.int64(types.int64, buffer, types.int64, types.int64, types.int64), generate


@helper
def fetch(side: Side, first: int, stop: int) -> Array:
    """Raw bytes of coordinates ``first`` to ``stop`` - 1 of a span; fewer if the file could not be read.

    Why not is for the caller to find out: compiled code knows no exceptions worth showing.
    """
    start, wanted = (first - side.origin) * side.itemsize, (stop - first) * side.itemsize
    if side.descriptor == WINDOW:
        return side.bytes[start : start + wanted]
    if side.descriptor == SHARED:
        return side.bytes[:wanted]
    done, attempts = 0, 0
    while done < wanted and attempts < _ATTEMPTS:
        count = read_at(side.descriptor, side.bytes, done, wanted - done, side.offset + start + done)
        if count > 0:
            done += count
        else:  # a signal interrupts once; whatever else is wrong stays wrong
            attempts += 1
    return side.bytes[:done]
