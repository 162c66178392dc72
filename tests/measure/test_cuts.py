"""Where cuts fall in a histogram, against NumPy's cumulative sums."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptdiff.measure.kernels.cuts import find_low_cut

BINS = 300


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(0, BINS - 1), st.integers(0, 2**32 - 1), st.sampled_from([0.02, 0.5, 1.0]))
def test_the_smallest_weights_are_those_of_cumulative_sums(
    data: st.DataObject, first: int, seed: int, filled: float
) -> None:
    last = data.draw(st.integers(first, BINS - 1))
    rng = np.random.default_rng(seed)
    weights = np.zeros((3, BINS), np.int64)
    weights[0] = rng.integers(1, 50, BINS) * (rng.random(BINS) < filled)
    weights[1] = rng.integers(0, weights[0] + 1)
    below, changed = (int(count) for count in weights[:2, :first].sum(axis=1))
    total = below + int(weights[0, first : last + 1].sum())
    rank = data.draw(st.integers(below + 1, total + 3))
    found = find_low_cut(weights, first, last, rank, below, changed)
    seen = below + np.cumsum(weights[0, first : last + 1])
    at = first + int(np.searchsorted(seen, rank))
    held = weights[:, at] if at <= last else (0, 0)
    before = below + int(weights[0, first:at].sum()), changed + int(weights[1, first:at].sum())
    assert found == (at, before[0], held[0], before[1], held[1])
