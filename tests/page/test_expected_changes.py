"""Where rounded noise falls, against SciPy and against noise that is rounded indeed."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import ndtr

from ckptdiff.measure.histograms import LOG2_BINS, log2_bins
from ckptdiff.page.expected_changes import expected_changes

DIGITS = {"bf16": (7, -133), "f16": (10, -24), "f32": (23, -149), "f8_e5m2": (2, -16)}


def chance(exponent: float, sigma: float, format: str, off: float) -> float:
    """To leave a cell, by SciPy: from its middle, or from a uniform place."""
    digits, lowest = DIGITS[format]
    step = 2.0 ** max(exponent - digits, lowest)
    middle = 2 * ndtr(-step / 2 / sigma)
    if not off:
        return float(middle)
    cell = step / sigma
    # The chance to leave to one side, from all places.
    uniform = 2 * quad(lambda z: ndtr(-z), 0, min(cell, 40))[0] / cell
    return float((1 - off) * middle + off * uniform)


@pytest.mark.parametrize("format", DIGITS)
@pytest.mark.parametrize("off", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("share", [1e-4, 0.1, 0.6])
def test_chances_are_those_of_scipy(format: str, off: float, share: float) -> None:
    rng = np.random.default_rng(1)
    base = np.zeros((1, LOG2_BINS), np.uint64)
    base[0, 0] = 50
    base[0, 140:152] = rng.integers(1, 100_000, 12)
    used = np.flatnonzero(base[0])
    counts, changed = base[0, used].astype(float), np.array([share * base.sum()])
    exponents = [-np.inf if at == 0 else at - 150.0 for at in used]

    def missing(log_sigma: float) -> float:
        each = [count * chance(e, 2.0**log_sigma, format, off) for count, e in zip(counts, exponents, strict=True)]
        return float(sum(each) - changed[0])

    sigma = 2.0 ** brentq(missing, -60, 40)
    expected = [count * chance(e, sigma, format, off) for count, e in zip(counts, exponents, strict=True)]
    found = expected_changes(base, changed, [format], np.array([off]))
    assert found.sum() == pytest.approx(changed[0], rel=1e-9)
    # Between 64 sigmas in each power of two it is a straight line.
    np.testing.assert_allclose(found[used], expected, rtol=0.02, atol=1e-3 * changed[0])


def test_rounded_noise_falls_where_it_is_expected() -> None:
    rng = np.random.default_rng(2)
    base = (0.02 * rng.standard_normal(400_000)).astype(ml_dtypes.bfloat16)
    tuned = (base.astype(np.float64) + 3e-5 * rng.standard_normal(base.size)).astype(ml_dtypes.bfloat16)
    bins, moved = log2_bins(base.astype(np.float64)), base != tuned
    counts = np.bincount(bins, minlength=LOG2_BINS).astype(np.uint64)
    fallen = np.bincount(bins[moved], minlength=LOG2_BINS)
    found = expected_changes(counts[None], np.array([float(moved.sum())]), ["bf16"], np.zeros(1))
    assert np.abs(found - fallen).max() < 0.01 * moved.sum()


def test_tensors_are_fitted_one_by_one() -> None:
    rng = np.random.default_rng(3)
    base = np.zeros((3, LOG2_BINS), np.uint64)
    base[:, 135:150] = rng.integers(1, 9999, (3, 15))
    changed = np.array([0.5, 0.01, 1.0]) * base.sum(axis=1)
    formats, off = ["bf16", "f32", "f16"], np.array([0.0, 0.2, 0.0])
    whole = expected_changes(base, changed, formats, off)
    alone = sum(expected_changes(base[[at]], changed[[at]], [formats[at]], off[[at]]) for at in range(3))
    np.testing.assert_allclose(whole, alone, rtol=1e-12)
    np.testing.assert_allclose(expected_changes(base[[2]], changed[[2]], ["f16"], np.zeros(1)), base[2], rtol=1e-6)
