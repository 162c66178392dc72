"""Gathering the codes of changed coordinates: both ways of doing it, on any processor that has them, against NumPy."""

import os
import subprocess
import sys

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import PATIENCE

from ckptdiff.codes.lanes import LANES, count_lanes, packs
from ckptdiff.measure.kernels.changed import gather_packed, gather_taken
from ckptdiff.measure.kernels.tiles import TILE, new_tile

WIDTHS = {np.uint16: np.float32, np.uint32: np.float32, np.uint64: np.float64}
WORDS = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 1 << 63, 2**64 - 1, 0xFF, 0x1FF, 0xFFFF_FFFF])


@numba.njit
def packed(left, right, tile):
    return gather_packed(left, right, tile)


@numba.njit
def taken(left, right, tile):
    return gather_taken(left, right, tile)


@numba.njit
def counted(codes, magnitude, counts):
    for j in range(len(codes)):
        count_lanes(codes, j, magnitude, counts)


WITHOUT = pytest.mark.skipif(not packs(), reason="no instructions for it here")
WAYS = [pytest.param(packed, id="packed", marks=WITHOUT), pytest.param(taken, id="taken")]


@pytest.mark.parametrize("code", WIDTHS)
@pytest.mark.parametrize("gather", WAYS)
@settings(max_examples=60, deadline=None)
@given(words=st.lists(WORDS, max_size=9), ragged=st.integers(0, LANES - 1), seed=st.integers(0, 99))
def test_marked_codes_lie_side_by_side(gather, code, words, ragged, seed):
    n = max(len(words) * LANES - ragged, 0)
    marked = np.unpackbits(np.array(words, np.uint64).view(np.uint8), bitorder="little")[:n].astype(bool)
    left, right = np.random.default_rng(seed).integers(0, np.iinfo(code).max, (2, n), code, True)
    tile = new_tile(np.dtype(code), np.dtype(WIDTHS[code]))
    tile.found[:], tile.left[:], tile.right[:] = 0xFFFF, 1, 2  # of the tile before
    bits = np.zeros(len(words) * LANES, bool)
    bits[:n] = marked
    tile.marks[: len(words)] = np.packbits(bits, bitorder="little").view(np.uint64)
    count = gather(left, right, tile)
    np.testing.assert_array_equal(tile.left[:count], left[marked])
    np.testing.assert_array_equal(tile.right[:count], right[marked])


def test_a_whole_tile_of_changes_has_room():
    left, right = np.random.default_rng(0).integers(0, 1 << 16, (2, TILE), np.uint16)
    tile = new_tile(np.dtype(np.uint16), np.dtype(np.float32))
    tile.marks[:] = np.uint64(2**64 - 1)
    assert taken(left, right, tile) == TILE
    np.testing.assert_array_equal(tile.found[:TILE], np.arange(TILE))
    np.testing.assert_array_equal(tile.left[:TILE], left)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 3), magnitude=st.sampled_from([0x7F, 0x7FFF]), seed=st.integers(0, 99))
def test_magnitudes_are_counted(rows, magnitude, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << 16, (rows, LANES), np.uint16)
    counts = np.zeros((3, 1 << 15), np.int64)
    counted(codes, np.uint64(magnitude), counts)
    np.testing.assert_array_equal(counts[0], np.bincount(codes.ravel() & magnitude, minlength=1 << 15))
    assert not counts[1:].any()


@pytest.mark.slow
def test_a_processor_without_the_instructions():
    """The whole kernel as it is compiled elsewhere: its self-test compares it with the reference."""
    code = """
from ckptdiff.measure.cpu import CpuBackend
from ckptdiff.codes.lanes import packs
from ckptdiff.measure.self_test import self_test
print(packs(), self_test(CpuBackend()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    assert done.stdout == "False None\n"
