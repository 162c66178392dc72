"""Packed masks do what the same operations on booleans do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ckptdiff.errors import MaskError
from ckptdiff.retrain import PackedMask

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)


@given(st.data(), SHAPES)
def test_operations_are_those_on_booleans(data: st.DataObject, shape: tuple[int, ...]) -> None:
    a, b = (data.draw(hnp.arrays(np.bool_, shape)) for _ in range(2))
    x, y = PackedMask.of(a), PackedMask.of(b)
    for packed, dense in ((x, a), (x.inverted(), ~a), (x | y, a | b), (x & y, a & b), (x - y, a & ~b)):
        assert np.array_equal(packed.dense(), dense)
        assert packed.dense().shape == shape
        assert packed.count == dense.sum()


@pytest.mark.parametrize("numel", [0, 1, 1000, 3 * (1 << 20) + 5])
@pytest.mark.parametrize("density", [0.0, 0.17, 1.0])
def test_a_random_mask_has_exactly_as_many_coordinates_spread_evenly(numel: int, density: float) -> None:
    mask = PackedMask.of(np.arange(numel) < round(density * numel))
    drawn = mask.shuffled(np.random.default_rng(1))
    assert drawn.count == mask.count
    if numel > 1 << 20 and density == 0.17:
        parts = [part.mean() for part in np.array_split(drawn.dense(), 5)]
        assert np.allclose(parts, density, atol=0.005)  # 7 standard deviations
        again = mask.shuffled(np.random.default_rng(2))
        assert abs((drawn & again).count / mask.count - density) < 0.005


def test_what_others_wrote_after_the_last_coordinate_does_not_count() -> None:
    mask = PackedMask((3,), np.array([0b11111101], np.uint8))
    assert mask.count == 2
    assert mask.inverted().dense().tolist() == [False, True, False]


def test_shapes_must_agree() -> None:
    with pytest.raises(MaskError, match="different shapes"):
        PackedMask.of(np.ones(8, bool)) | PackedMask.of(np.ones((2, 4), bool))
    with pytest.raises(ValueError, match="bits of shape"):
        PackedMask((9,), np.zeros(1, np.uint8))
