"""The Numba backend against the NumPy reference: counts, masks, histograms and maxima equal, sums within 1e-12."""

import zlib

import numpy as np
import pytest
from code_samples import assert_partials_equal, random_codes, tuned_codes
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptdiff.formats import FORMATS, compare_format
from ckptdiff.kernel_library import flatten
from ckptdiff.measure.cpu import CpuBackend
from ckptdiff.measure.kernels.tiles import TILE, new_measure
from ckptdiff.measure.partial import BLOCK, Partial, Refined, Rule, Scan, Sum, Targets
from ckptdiff.measure.passes import FloatMeasurement
from ckptdiff.measure.reference import ReferenceBackend
from ckptdiff.measure.source import InMemory
from ckptdiff.options import MaskRule

SIZES = (0, 1, 7, 8, 63, 64, 65, 4097, 32_768, 65_535, 65_536, 65_537, (1 << 17) + 77)
# Each pair of widths has kernels of its own, which take ten seconds to compile where none are kept yet.
QUICK = [*((name, name) for name in FORMATS), ("bf16", "f32"), ("f32", "bf16")]
PAIRS = [
    pytest.param((a, b), marks=() if (a, b) in QUICK else pytest.mark.slow, id=f"{a}-{b}")
    for a in FORMATS
    for b in FORMATS
]
CPU, REFERENCE = CpuBackend(), ReferenceBackend()


def source(base, tuned):
    return InMemory(base.view(np.uint8), tuned.view(np.uint8), base.size)


def both(scan, base, tuned, first_tie=0):
    results = []
    for worker in (CPU, REFERENCE):
        partial = Partial()
        mask = worker.scan(scan, source(base, tuned), partial, first_tie)
        results.append((partial, None if mask is None else mask.copy()))
    return results


def assert_equal(got, expected):
    assert_partials_equal(got[0], expected[0])
    assert (got[1] is None) == (expected[1] is None)
    if got[1] is not None:
        np.testing.assert_array_equal(got[1], expected[1])


@pytest.mark.parametrize("kind", ["wild", "tame"])
@pytest.mark.parametrize("compare", ["bf16", "stored"])
@pytest.mark.parametrize("names", PAIRS)
def test_scan_equals_reference(names, compare, kind):
    rng = np.random.default_rng(zlib.crc32(repr((names, compare, kind)).encode()))
    base_format, tuned_format = (FORMATS[name] for name in names)
    target = compare_format(base_format, tuned_format, compare)
    rules = [(Rule.NONE, 0.0), (Rule.BITWISE, 0.0), (Rule.ABOVE, 1e-5), (Rule.ETA, 4e-3)]
    for i, n in enumerate(SIZES):
        base = random_codes(base_format, n, rng, kind)
        tuned = tuned_codes(base, base_format, tuned_format, n, rng, kind)
        rule, cut = rules[i % 4]
        scan = Scan(
            base_format, tuned_format, target, (0.0, 1e-8, 1e-5, 1e-4), 1e-3, rule, cut, want_mask=rule != Rule.NONE
        )
        assert_equal(*both(scan, base, tuned))


@pytest.mark.parametrize("name", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("base", "tuned"), [(5, 6), (5, 7), (5, 132), (0x3000, 0x30FF), (5, 261), (0x7000, 0xF000), (0xF000, 0x7000)]
)
def test_whole_tiles_of_one_distance(name, base, tuned):
    """As many as 16 bits do not count, which hold the longest one."""
    apart = abs(base - tuned) if (base ^ tuned) < 0x8000 else (base & 0x7FFF) + (tuned & 0x7FFF)
    scan = Scan(FORMATS[name], FORMATS[name], FORMATS[name])
    got, expected = both(scan, np.full(2 * TILE, base, np.uint16), np.full(2 * TILE, tuned, np.uint16))
    assert_equal(got, expected)
    assert dict(enumerate(got[0].ulp)) == {k: 2 * TILE * (k == int(np.log2(apart))) for k in range(64)}


@pytest.mark.parametrize("name", FORMATS)
def test_refine_equals_reference(name):
    rng = np.random.default_rng(7)
    format = FORMATS[name]
    base = random_codes(format, 30_000, rng, "tame")
    tuned = tuned_codes(base, format, format, 30_000, rng, "tame")
    scan = Scan(format, format, format)
    delta_bits = 64 if format.bits == 64 else 32
    seen = np.flatnonzero(both(scan, base, tuned)[1][0].deltas[0])
    weight_bins = () if format.bits <= 16 else tuple(np.flatnonzero(both(scan, base, tuned)[1][0].weights[0])[-3:])
    targets = Targets(delta_bits - 16, tuple(seen[-2:]), weight_bins, (1e-6, 1e-4), (1e-5, 0.0))
    found = []
    for worker in (CPU, REFERENCE):
        refined = Refined.empty(targets)
        worker.refine(scan, targets, source(base, tuned), refined)
        found.append(refined)
    np.testing.assert_array_equal(found[0].deltas, found[1].deltas)
    np.testing.assert_array_equal(found[0].weights, found[1].weights)
    np.testing.assert_array_equal(found[0].within, found[1].within)
    np.testing.assert_allclose(found[0].tails, found[1].tails, rtol=1e-12)
    assert found[1].deltas.sum() > 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 3000), st.floats(0, 1), st.integers(0, 500), st.data())
def test_top_rule_takes_exactly_its_share_of_ties(seed, n, fraction, first_tie, data):
    rng = np.random.default_rng(seed)
    format = FORMATS["f32"]
    base = np.zeros(n, np.float32)
    tuned = rng.choice(np.array([0, 0, 1, 2], np.float32), n) * rng.choice([-1, 1], n).astype(np.float32)
    ties = int(np.count_nonzero(np.abs(tuned) == 1))
    take = data.draw(st.integers(0, ties))
    scan = Scan(format, format, format, rule=Rule.TOP, cut=1.0, ties=ties, take=take, want_mask=True)
    got, expected = both(scan, base.view(np.uint32), tuned.view(np.uint32))
    assert_equal(got, expected)
    mask = np.unpackbits(got[1], bitorder="little")[:n].astype(bool)
    assert mask[np.abs(tuned) == 2].all()
    assert not mask[tuned == 0].any()
    assert np.count_nonzero(mask & (np.abs(tuned) == 1)) == take


def test_overflowing_delta_is_left_out_of_sums():
    format = FORMATS["bf16"]
    base = np.array([0x7F7F, 0x3F80], np.uint16)  # the largest value, and 1
    tuned = np.array([0xFF7F, 0x4000], np.uint16)  # its negative, and 2
    scan = Scan(format, format, format, (1e-5,), 1e-3, Rule.ABOVE, 1e-5, want_mask=True)
    got, expected = both(scan, base, tuned)
    assert_equal(got, expected)
    assert got[0].sums[0, Sum.DELTA] == 1.0
    assert got[1][0] == 0b11


def test_a_block_of_every_pattern_fills_a_whole_mask_chunk():
    codes = np.tile(np.arange(1 << 16, dtype=np.uint16), 16)
    assert codes.size == BLOCK
    format = FORMATS["bf16"]
    scan = Scan(format, format, format, (1e-5,), 1e-3, Rule.BITWISE, want_mask=True)
    got, expected = both(scan, codes, np.roll(codes, 1))
    assert_equal(got, expected)


@pytest.mark.parametrize("kind", ["abs", "eta", "rel", "top"])
def test_a_whole_number_as_a_threshold_takes_no_kernel_of_its_own(kind):
    bf16, types = FORMATS["bf16"], ([], [])
    for key, value in zip(types, (20, 20.0), strict=True):
        measure = new_measure(FloatMeasurement((bf16, bf16, bf16), 10, MaskRule(kind, value), True).scan)
        flatten(measure, key, [])
    assert types[0] == types[1] != []
