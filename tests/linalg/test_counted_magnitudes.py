from __future__ import annotations

import numpy as np
import pytest

from ckptdiff.linalg.on_numpy import NUMPY


@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (5, 4097), (64, 4099), (70_001, 4)], ids=str)
def test_magnitudes_are_counted_as_numpy_does(shape: tuple[int, int]) -> None:
    """Also where so many come that neighbours are counted apart."""
    rng, found, known = np.random.default_rng(0), None, np.zeros((3, 1 << 15), np.int64)
    for _ in range(2):
        base = (0.02 * rng.standard_normal(shape)).astype(np.float32)
        delta = (1e-5 * rng.standard_normal(shape) * (rng.random(shape) < 0.3)).astype(np.float32)
        found = NUMPY.count_magnitudes(found, base, delta, 1e-5)
        magnitudes = base.view(np.uint32) >> 16 & 0x7FFF
        for row, chosen in zip(known, (delta == delta, delta != 0, abs(delta) > np.float32(1e-5)), strict=True):
            row += np.bincount(magnitudes[chosen], minlength=1 << 15)
    (counts,) = NUMPY.magnitudes(found)
    assert np.array_equal(counts, known)
