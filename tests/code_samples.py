"""Codes to compare in tests of backends, and what equal partials are."""

from __future__ import annotations

import numpy as np

from ckptdiff.measure.partial import Sum


def random_codes(format, n, rng, kind):
    """Codes of one side: every bit pattern ("wild"), or weights as models hold them ("tame")."""
    if kind == "wild" and format.bits == 64:  # the exponents of float32, so that sums do not overflow
        words = rng.integers(0, 1 << 32, n, dtype=np.uint64).astype(np.uint32)
        with np.errstate(invalid="ignore"):  # signalling NaN
            wide = words.view(np.float32).astype(np.float64).view(np.uint64)
        return wide ^ rng.integers(0, 1 << 29, n, dtype=np.uint64)
    if kind == "wild":
        return rng.integers(0, 1 << format.bits, n, dtype=np.uint64).astype(format.code_dtype)
    return encode(format, rng.standard_normal(n) * 0.02)


def encode(format, values):
    """Codes near given values."""
    if format.bits >= 32:
        return values.astype(f"f{format.bits // 8}").view(format.code_dtype)
    with np.errstate(invalid="ignore"):  # signalling NaN
        table = format.values().astype(np.float64)
    finite = np.flatnonzero(np.isfinite(table))
    order = finite[np.argsort(table[finite], kind="stable")]
    return order[np.clip(np.searchsorted(table[order], values), 0, order.size - 1)].astype(format.code_dtype)


def tuned_codes(base, base_format, format, n, rng, kind):
    """Codes of the other side: unrelated ("wild"), or the base with a tenth of the coordinates moved."""
    if kind == "wild":
        return random_codes(format, n, rng, kind)
    if base_format != format:
        values = base_format.values()[base] if base_format.bits <= 16 else base.view(f"f{base_format.bits // 8}")
        return encode(format, values.astype(np.float64))
    moved = rng.random(n) < 0.1
    return np.where(moved, base + rng.integers(1, 4, n).astype(base.dtype), base).astype(base.dtype)


def assert_partials_equal(got, expected):
    """Integers equal, sums within 1e-12 of what was added up."""
    assert got.numel == expected.numel
    np.testing.assert_array_equal(got.counts, expected.counts)
    np.testing.assert_array_equal(got.within, expected.within)
    np.testing.assert_array_equal(got.weights, expected.weights)
    np.testing.assert_array_equal(got.deltas, expected.deltas)
    np.testing.assert_array_equal(got.ulp, expected.ulp)
    np.testing.assert_array_equal(got.max_abs, expected.max_abs)
    scale = np.abs(expected.sums).max(initial=0)
    scale = np.maximum(expected.sums[:, [Sum.ABS_DELTA]], 0) + scale
    assert got.sums.shape == expected.sums.shape
    assert (np.abs(got.sums - expected.sums) <= 1e-12 * scale).all()
    for histogram, first in ((got.weights, 0), (got.deltas, 2)):
        used = np.flatnonzero(histogram.any(axis=0))
        if used.size:
            assert got.span[first] <= used[0] and used[-1] <= got.span[first + 1]
