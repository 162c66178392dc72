"""Loop over a span: fetch a piece of both sides, cast it tile by tile, measure each tile."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ckptdiff.codes.fetch import FETCH, Side, fetch
from ckptdiff.jit import STEP, Later, helper, kernel, overload
from ckptdiff.measure.kernels.codes import find_bins, measure_codes, note_bins, take_values
from ckptdiff.measure.kernels.deltas import add_ulp
from ckptdiff.measure.kernels.stored import Cast, Stored, count_stored, decode
from ckptdiff.measure.kernels.tiles import TILE, Array, Facts, Measure, Tile, Totals, new_tile
from ckptdiff.measure.kernels.wide import measure_wide, take_floats
from ckptdiff.measure.partial import BLOCK

types = Later("numba.types")

NO_CAST = int(Cast.NONE)
MANY = 1 << 19
"""Coordinates from which on the bins in use are found in the histogram itself."""


class Workspace(NamedTuple):
    """Work space of one thread for one width of codes."""

    tile: Tile
    out: tuple[Array, Array]
    """Codes of a tile that were cast, both sides."""
    codes: tuple[Array, Array]
    """The same memory, read-only, as codes are that need no cast: one compiled kernel serves both."""
    scratch: tuple[Array, Array]
    """Codes of a tile in the common format of both sides, as uint64."""


def new_work(code: np.dtype[Any], real: np.dtype[Any]) -> Workspace:
    """Work space for codes and a d of the given dtypes."""
    out = np.zeros(TILE, code), np.zeros(TILE, code)
    scratch = np.zeros(TILE, np.uint64), np.zeros(TILE, np.uint64)
    return Workspace(new_tile(code, real), out, (read_only(out[0]), read_only(out[1])), scratch)


def read_only(array: Array) -> Array:
    """A view that cannot be written to."""
    view = array.view()
    view.flags.writeable = False
    return view


def measure_tile(
    a: Array, b: Array, facts: Facts, tile: Tile, measure: Measure, totals: Totals, sums: Array, words: Array
) -> None:
    """Measure one tile of codes, shape (n,), 8-bit ones widened with zeros, whose addresses are multiples of 8.

    ``totals`` and ``sums``, float64 of shape (len(Sum),), are added to; ``words``, uint64 of shape (ceil(n / 64),) or
    (0,), receives the mask.
    """
    raise NotImplementedError("compiled code only")


@overload(measure_tile, jit_options=STEP, inline="never", strict=False)
def _measure_tile(a: Any, b: Any, facts: Any, tile: Any, measure: Any, totals: Any, sums: Any, words: Any) -> Any:
    chosen = measure_codes if a.dtype == types.uint16 else measure_wide
    return lambda a, b, facts, tile, measure, totals, sums, words: chosen(
        a, b, facts, tile, measure, totals, sums, words
    )


def values_of(facts: Facts, tile: Tile) -> None:
    """Values and d of the changed coordinates of a tile."""
    raise NotImplementedError("compiled code only")


@overload(values_of, jit_options=STEP, inline="never", strict=False)
def _values_of(facts: Any, tile: Any) -> Any:
    chosen = take_values if tile[3].dtype == types.uint16 else take_floats
    return lambda facts, tile: chosen(facts.values, tile)


def note_span(codes: Array, facts: Facts, totals: Totals, many: bool) -> None:
    """Note which bins of ``weights`` are in use: those of a tile, or with ``many`` those of everything counted."""
    raise NotImplementedError("compiled code only")


@overload(note_span, jit_options=STEP, inline="never", strict=False)
def _note_span(codes: Any, facts: Any, totals: Any, many: Any) -> Any:
    def narrow(codes: Array, facts: Facts, totals: Totals, many: bool) -> None:
        if many:
            find_bins(totals.weights[0], totals.span)
        else:
            note_bins(codes, facts.magnitude, totals.span)

    def wide(codes: Array, facts: Facts, totals: Totals, many: bool) -> None:
        """Wide formats note it as they count."""

    return narrow if codes.dtype == types.uint16 else wide


@helper
def codes_of(raw: Array, stored: tuple[Stored, Stored] | None, side: int, work: Workspace) -> Array:
    """Codes of a tile of stored elements."""
    if stored is None:
        return raw.view(work.codes[0].dtype)
    one = stored[side]
    if one.cast == NO_CAST:
        return raw.view(work.codes[0].dtype)
    n = raw.size // one.itemsize
    decode(raw, one.cast, one.itemsize, one.table, work.out[side][:n])
    return work.codes[side][:n]


@kernel
def scan_span(
    sides: tuple[Side, Side],
    stored: tuple[Stored, Stored] | None,
    extent: tuple[int, int],
    facts: Facts,
    work: Workspace,
    measure: Measure,
    totals: Totals,
    words: Array,
) -> int:
    """Measure a span of blocks from coordinate ``extent[0]``, a multiple of ``FETCH``, to ``extent[1]`` - 1.

    ``stored`` is None if both sides are stored as codes of the compare format: a smaller kernel, which compiles sooner.
    ``totals`` is added to; ``words``, uint64 of shape (ceil(n / 64),) or (0,), receives the mask. Returns how far it
    came: less than all if a piece could not be read.
    """
    first, numel = extent
    many = numel - first > MANY
    widths = sides[0].itemsize, sides[1].itemsize
    while first < numel:
        stop = min(first + FETCH, numel)
        base, tuned = fetch(sides[0], first, stop), fetch(sides[1], first, stop)
        if base.size < (stop - first) * widths[0] or tuned.size < (stop - first) * widths[1]:
            break
        sums = totals.sums[first // BLOCK]
        for start in range(0, stop - first, TILE):
            end = min(start + TILE, stop - first)
            x, y = base[start * widths[0] : end * widths[0]], tuned[start * widths[1] : end * widths[1]]
            a, b = codes_of(x, stored, 0, work), codes_of(y, stored, 1, work)
            if stored is not None:
                count_stored((x, y), stored, (a, b), measure, work.scratch, (totals.counts, sums))
            if not many:
                note_span(a, facts, totals, False)
            at = (first + start) // 64
            measure_tile(a, b, facts, work.tile, measure, totals, sums, words[at : at + (end - start + 63) // 64])
        first = stop
    if many:
        note_span(work.codes[0], facts, totals, True)
    add_ulp(work.tile, totals.ulp)
    return first
