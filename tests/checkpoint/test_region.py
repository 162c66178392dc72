"""Parts of tensors: which elements they have, against boxes that NumPy draws."""

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ckptdiff.checkpoint.region import Spread, among, holds, read_numel, rows_of
from ckptdiff.checkpoint.weights import Region


@st.composite
def regions(draw):
    """A region of a tensor of experts, and which elements it has by NumPy: for each expert, some parts of its rows."""
    experts, across = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    count, size = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    turns, flipped, plain = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    there = [
        pair
        for pair in itertools.product(range(1 if plain else experts), range(count))
        if draw(st.integers(0, 2)) < 2  # most are
    ] or [(0, 0)]
    boxes = []
    for expert, part in there:
        rows = (part, count * size, count) if turns else (part * size, (part + 1) * size, 1)
        body = [(0, across, 1), rows] if flipped else [rows, (0, across, 1)]
        boxes.append(tuple(body if plain else [(expert, expert + 1, 1), *body]))
    shape = (across, count * size) if flipped else (count * size, across)
    shape = shape if plain else (experts, *shape)
    if draw(st.booleans()) and not flipped and across == 1:  # biases
        shape, boxes = shape[:-1], [box[:-1] for box in boxes]
    expected = np.zeros(shape, bool)
    for box in boxes:
        expected[tuple(slice(*axis) for axis in box)] = True
    return Region(shape, tuple(boxes), int(expected.sum())), expected.reshape(-1)


@given(regions(), st.data())
def test_a_region_has_the_elements_of_its_boxes(both, data):
    region, expected = both
    width = region.shape[-1]
    rows = expected.reshape(-1, width)
    assert read_numel(region) == rows.any(1).sum() * width
    first, stop = sorted(data.draw(st.integers(0, expected.size)) for _ in range(2))
    np.testing.assert_array_equal(among(region, first, stop), expected[first:stop])
    top, bottom = sorted(data.draw(st.integers(0, len(rows))) for _ in range(2))
    assert holds(region, top * width, bottom * width) == rows[top:bottom].all()


@given(regions(), st.data())
def test_rows_that_are_read_hold_what_is_asked_for(both, data):
    region, expected = both
    first = data.draw(st.integers(0, region.numel - 1))
    stop = data.draw(st.integers(first + 1, region.numel))
    numbers = np.arange(expected.size).reshape(-1, region.shape[-1])
    found, last, read = [], 0, 0
    for (top, bottom), chosen in rows_of(region, first, stop):
        assert last <= top < bottom and chosen.shape == numbers[top:bottom].shape
        found.append(numbers[top:bottom][chosen])
        last, read = bottom, read + bottom - top
    np.testing.assert_array_equal(np.concatenate(found), np.flatnonzero(expected)[first:stop])
    # Long stretches without anything are not read.
    asked = len(np.unique(np.concatenate(found) // region.shape[-1]))
    assert read <= 9 * asked


@given(regions(), st.integers(1, 50), st.data())
def test_bits_go_back_to_their_places(both, block, data):
    region, expected = both
    rng = np.random.default_rng(0)
    mask = expected & (rng.random(expected.size) < 0.5)
    bits = mask[expected]
    cuts = sorted(data.draw(st.lists(st.integers(0, bits.size), max_size=4)))
    spread, found = Spread(region, block), []
    for part in np.split(bits, cuts):
        found += list(spread.take(part))
    assert [one.size for one in found[:-1]] == [block] * (math.ceil(mask.size / block) - 1)
    np.testing.assert_array_equal(np.concatenate(found), mask)
