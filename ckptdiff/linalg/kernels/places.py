"""List the places of flags that are set, many at a time; steps of kernels."""

from __future__ import annotations

from ckptdiff.codes.bits import pack64
from ckptdiff.codes.lanes import LANES
from ckptdiff.codes.positions import put_positions
from ckptdiff.jit import helper
from ckptdiff.measure.kernels.tiles import Array

SOME = 1 << 12
"""Flags that are looked at together; a multiple of ``LANES``."""


@helper
def places_of(flags: Array, size: int, places: Array) -> int:
    """List the places of the bytes that are not zero among the first `size`, in order; returns how many there are.

    Flags are uint8, places uint16 with room for ``LANES`` more. What follows the first `size`, up to a multiple of
    ``LANES``, is zero.
    """
    found = 0
    for first in range(0, size, LANES):
        found = put_positions(pack64(flags, first), first, places, found)
    return found
