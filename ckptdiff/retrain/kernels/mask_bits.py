"""Copy packed bits from one place of a mask to another of a mask in another layout: no coordinate becomes a byte."""

from __future__ import annotations

from ckptdiff.jit import kernel
from ckptdiff.measure.kernels.tiles import Array

__all__ = ["add_bits"]


@kernel
def add_bits(bits: Array, start: int, down: int, right: int, out: Array, to: int, below: int, beside: int,
             rows: int, columns: int) -> None:  # fmt: skip
    """Set bits of `out` where those of a matrix inside `bits` are set.

    Entry i, j is bit ``start + i * down + j * right`` of `bits` and bit ``to + i * below + j * beside`` of `out`, both
    least significant first in their bytes; what is set in `out` stays so.
    """
    whole = right == beside == 1 and start % 8 == to % 8 == down % 8 == below % 8 == 0
    for i in range(rows):
        ours, theirs, j = start + i * down, to + i * below, 0
        if whole:
            for k in range(columns >> 3):
                out[(theirs >> 3) + k] |= bits[(ours >> 3) + k]
            j = columns & ~7
        while j < columns:
            at, into = ours + j * right, theirs + j * beside
            out[into >> 3] |= ((bits[at >> 3] >> (at & 7)) & 1) << (into & 7)
            j += 1
