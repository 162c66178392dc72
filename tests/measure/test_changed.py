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

from ckptdiff.codes.bits import population
from ckptdiff.codes.lanes import LANES, packs
from ckptdiff.measure.kernels.changed import pack_codes, pick_codes
from ckptdiff.measure.kernels.tiles import new_tile

WIDTHS = {np.uint16: np.float32, np.uint32: np.float32, np.uint64: np.float64}
WORDS = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 1 << 63, 2**64 - 1, 0xFF, 0x1FF, 0xFFFF_FFFF])


def gathering(append):
    @numba.njit
    def gather(left, right, words, tile):
        count = 0
        for j in range(words.size):
            append(left, right, j * LANES, words[j], tile, count)
            count += population(words[j])
        return count

    return gather


WITHOUT = pytest.mark.skipif(not packs(), reason="no instructions for it here")
WAYS = [pytest.param(gathering(pack_codes), id="pack", marks=WITHOUT), pytest.param(gathering(pick_codes), id="pick")]


@pytest.mark.parametrize("code", WIDTHS)
@pytest.mark.parametrize("gather", WAYS)
@settings(max_examples=60, deadline=None)
@given(words=st.lists(WORDS, max_size=9), seed=st.integers(0, 99))
def test_marked_codes_lie_side_by_side(gather, code, words, seed):
    words = np.array(words, np.uint64)
    left, right = np.random.default_rng(seed).integers(0, np.iinfo(code).max, (2, words.size * LANES), code, True)
    tile = new_tile(np.dtype(code), np.dtype(WIDTHS[code]))
    count = gather(left[None], right[None], words, tile)
    marked = np.unpackbits(words.view(np.uint8), bitorder="little").astype(bool)
    np.testing.assert_array_equal(tile.left[:count], left[marked])
    np.testing.assert_array_equal(tile.right[:count], right[marked])


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
