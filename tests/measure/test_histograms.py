from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptdiff.measure.histograms import HistogramRows, log2_bins, log2_floor

FINITE = st.floats(allow_nan=False, allow_infinity=False)


def bin_of(value: float) -> int:
    """Bin by the definition, without floating logarithms."""
    if value == 0:
        return 0
    numerator, denominator = abs(value).as_integer_ratio()
    exponent = numerator.bit_length() - denominator.bit_length()
    exponent -= numerator << max(0, -exponent) < denominator << max(0, exponent)
    return 1 + min(max(exponent, -149), 128) + 149


@given(st.lists(FINITE, max_size=20))
def test_bins_of_float64(values: list[float]) -> None:
    assert log2_bins(np.array(values, np.float64)).tolist() == [bin_of(value) for value in values]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20))
def test_bins_of_float32(values: list[float]) -> None:
    assert log2_bins(np.array(values, np.float32)).tolist() == [bin_of(value) for value in values]


def test_edges_of_the_bins() -> None:
    floor = log2_floor()
    assert floor.shape == (279,)
    assert floor[0] == -math.inf
    for k in (1, 2, 150, 277, 278):
        assert log2_bins(np.array([2.0 ** floor[k], -(2.0 ** floor[k])])).tolist() == [k, k]
    tiny, huge = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    assert log2_bins(np.array([0.0, -0.0, tiny, huge], np.float32)).tolist() == [0, 0, 1, 277]
    assert log2_bins(np.array([1e-300, 1e300])).tolist() == [1, 278]


def test_rows_have_one_shape() -> None:
    row = HistogramRows.empty(3)
    assert (len(row), row.delta.shape, row.ulp.shape, row.changed.dtype) == (3, (3, 279), (3, 64), np.uint64)
    with pytest.raises(ValueError, match="delta is uint64 of shape"):
        HistogramRows(row.ulp, row.base, row.changed, row.ulp)
    with pytest.raises(ValueError, match="ulp is int64"):
        HistogramRows(row.delta, row.base, row.changed, row.ulp.astype(np.int64))
    with pytest.raises(ValueError, match=r"changed is uint64 of shape \(2, 279\)"):
        HistogramRows(row.delta, row.base, row.changed[:2], row.ulp)
