"""The shipped kernels, run on the CPU, against the NumPy reference: integers equal, sums within 1e-12."""

import zlib

import numpy as np
import pytest
from code_samples import assert_partials_equal, encode, random_codes, tuned_codes
from host_kernels import QUICK, TESTED
from kernel_runs import UNTOUCHED, nonzero, padded, run_refine, run_scan, tiles_of

from ckptdiff.formats import FORMATS
from ckptdiff.measure.cuda.coded_side import CODE_BOX, CODES
from ckptdiff.measure.cuda.layout import (
    BIN,
    DEVICE_TILE,
    RECORD,
    ROWS,
    SCAN_SETTINGS,
    SEARCH,
    TILE_RECORD,
    add_scanned,
    scan_settings,
)
from ckptdiff.measure.partial import BINS, BLOCK, Count, Partial, Refined, Rule, Scan, Sum, Targets
from ckptdiff.measure.reference import ReferenceBackend
from ckptdiff.measure.source import InMemory

SIZES = (1, 7, 8, 9, 511, 513, 4097, DEVICE_TILE - 1, DEVICE_TILE, DEVICE_TILE + 1)
RULES = [(Rule.NONE, 0.0), (Rule.BITWISE, 0.0), (Rule.ABOVE, 1e-5), (Rule.ETA, 4e-3)]
EPS = (0.0, 1e-8, 1e-5, 1e-4)
EACH = [pytest.param(names, marks=[] if names in QUICK else pytest.mark.slow) for names in TESTED]
NARROW = [each for each in EACH if FORMATS[each.values[0][0]].bits <= 16]


def in_memory(base, tuned):
    return InMemory(base.view(np.uint8), tuned.view(np.uint8), base.size)


def oracle(scan, base, tuned, first_tie=0):
    partial = Partial()
    mask = ReferenceBackend().scan(scan, in_memory(base, tuned), partial, first_tie)
    return partial, mask


def agree(library, scan, base, tuned, first_tie=0, **how):
    got, mask = run_scan(library, scan, base, tuned, first_tie, **how)
    expected, bits = oracle(scan, base, tuned, first_tie)
    assert_partials_equal(got, expected)
    np.testing.assert_array_equal(mask, bits)


def sample(names, n, kind, seed=0):
    base_format, tuned_format, compare = (FORMATS[name] for name in names)
    rng = np.random.default_rng(zlib.crc32(repr((names, n, kind, seed)).encode()))
    base = random_codes(base_format, n, rng, kind)
    tuned = tuned_codes(base, base_format, tuned_format, n, rng, kind)
    if (
        kind == "tame" and base_format == tuned_format and compare.bits < base_format.bits
    ):  # steps that survive the cast
        tuned = base + (tuned - base) * base.dtype.type(1 << (base_format.bits - compare.bits - 1))
    return base, tuned


def test_records_are_laid_out_alike(libraries):
    sizes = [record.itemsize for record in (TILE_RECORD, RECORD, SCAN_SETTINGS, SEARCH, CODE_BOX, CODES, BIN)]
    assert libraries(*TESTED[0]).sizes() == sizes


@pytest.mark.parametrize("kind", ["wild", "tame"])
@pytest.mark.parametrize("names", EACH, ids="-".join)
def test_scan_equals_reference(libraries, names, kind):
    library = libraries(*names)
    formats = [FORMATS[name] for name in names]
    for i, n in enumerate(SIZES):
        rule, cut = RULES[(i + (kind == "wild")) % 4]
        scan = Scan(*formats, EPS, 1e-3, rule, cut, want_mask=True)
        agree(library, scan, *sample(names, n, kind), blocks=1 + i % 3, seed=i)


@pytest.mark.parametrize("names", NARROW, ids="-".join)
def test_every_code_means_what_its_table_says(libraries, names):
    base_format, tuned_format, compare = (FORMATS[name] for name in names)
    n = 1 << 16
    base = (np.arange(n) % (1 << base_format.bits)).astype(base_format.code_dtype)
    tuned = np.resize(random_codes(tuned_format, 1 << 8, np.random.default_rng(5), "wild"), n)
    if base_format == tuned_format:
        tuned = np.roll(base, 1)
    scan = Scan(base_format, tuned_format, compare, EPS, 1e-3, Rule.BITWISE, want_mask=True)
    agree(libraries(*names), scan, base, tuned)


def special_codes(format):
    """Zero, the least subnormal, the least normal, one and its neighbour, the largest, Inf, NaN; of both signs."""
    normal = {"bf16": 0x80, "f16": 0x400, "f8_e4m3": 8, "f8_e5m2": 4, "f32": 0x800000, "f64": 1 << 52}[format.name]
    one = int(encode(format, np.ones(1))[0])
    sizes = [0, 1, normal - 1, normal, one, one + 1, format.infinite - 1, format.infinite, format.nan, format.magnitude]
    return np.array([code | sign for code in sizes for sign in (0, format.magnitude + 1)], format.code_dtype)


@pytest.mark.parametrize("names", EACH, ids="-".join)
def test_special_codes_against_each_other(libraries, names):
    formats = [FORMATS[name] for name in names]
    base, tuned = np.meshgrid(special_codes(formats[0]), special_codes(formats[1]))
    base, tuned = base.reshape(-1), tuned.reshape(-1)
    if "f64" in names:  # sums of these would overflow
        keep = ~np.isin(base & formats[0].code_dtype.type(formats[0].magnitude), formats[0].infinite - 1)
        keep &= ~np.isin(tuned & formats[1].code_dtype.type(formats[1].magnitude), formats[1].infinite - 1)
        base, tuned = base[keep], tuned[keep]
    for rule, cut in RULES:
        scan = Scan(*formats, EPS, 1e-3, rule, cut, want_mask=True)
        agree(libraries(*names), scan, base, tuned)


def test_scan_by_as_many_threads_as_a_gpu_runs(libraries):
    names = ("bf16", "bf16", "bf16")
    scan = Scan(*(FORMATS[name] for name in names), EPS, 1e-3, Rule.ABOVE, 1e-5, want_mask=True)
    agree(libraries(*names, threads=512), scan, *sample(names, 3 * DEVICE_TILE + 12_345, "tame"))


def test_blocks_of_a_large_tensor_have_their_own_sums(libraries):
    names = ("bf16", "bf16", "bf16")
    base, tuned = sample(names, BLOCK + DEVICE_TILE + 3, "tame")
    scan = Scan(*(FORMATS[name] for name in names), EPS, 1e-3)
    got, _ = run_scan(libraries(*names), scan, base, tuned)
    assert_partials_equal(got, oracle(scan, base, tuned)[0])


def test_no_bit_depends_on_grid_or_schedule(libraries):
    names = ("f32", "f32", "f32")
    base, tuned = sample(names, 5 * DEVICE_TILE + 99, "tame")
    scan = Scan(*(FORMATS[name] for name in names), EPS, 1e-3, Rule.ABOVE, 1e-5, want_mask=True)
    first, mask = run_scan(libraries(*names), scan, base, tuned, blocks=1, seed=0)
    for blocks, seed in ((2, 1), (3, 2), (6, 3), (17, 4)):
        other, bits = run_scan(libraries(*names), scan, base, tuned, blocks=blocks, seed=seed)
        np.testing.assert_array_equal(first.sums, other.sums)
        assert_partials_equal(other, first)
        np.testing.assert_array_equal(mask, bits)


@pytest.mark.parametrize("blocks", [1, 3])
def test_many_tensors_in_one_launch_keep_apart(libraries, blocks):
    names = ("f32", "f32", "bf16")
    formats = [FORMATS[name] for name in names]
    scan = Scan(*formats, EPS, 1e-3, Rule.ABOVE, 1e-5, want_mask=True)
    pairs = [sample(names, n, "tame", n) for n in (3, 4096, 1, DEVICE_TILE + 1, 64, 9)]
    tiles, sides, offset = [], [], 0
    for record, (base, _) in enumerate(pairs):
        own = tiles_of(scan, base.size, record)
        for field in ("base", "tuned"):
            own[field] += offset
        own["mask"] += offset
        tiles.append(own)
        offset += padded(base).size // 64 * 64
    for side in (0, 1):
        sides.append(np.concatenate([padded(pair[side])[: padded(pair[side]).size // 64 * 64] for pair in pairs]))
        sides[-1] = np.concatenate([sides[-1], np.zeros(64, np.uint8)])
    together = np.concatenate(tiles)
    mask, sums = np.full(offset, UNTOUCHED, np.uint8), np.full((together.size, len(Sum)), np.nan)
    records, rows = np.zeros(len(pairs), RECORD), np.zeros(len(pairs) * ROWS * BINS, np.uint64)
    arguments = [together, np.uint32(together.size), scan_settings(scan), *sides, mask, sums, records, rows]
    libraries(*names).launch("scan", blocks, arguments, seed=blocks)
    for record, (base, tuned) in enumerate(pairs):
        got, own = Partial(), together["record"] == record
        bins = rows.reshape(len(pairs), -1)[record]
        add_scanned(scan, base.size, records[record], sums[own], nonzero(bins), got)
        expected, bits = oracle(scan, base, tuned)
        assert_partials_equal(got, expected)
        start = int(together["mask"][own][0])
        np.testing.assert_array_equal(mask[start : start + bits.size], bits)


@pytest.mark.parametrize("names", TESTED[:7], ids="-".join)
def test_refine_equals_reference(libraries, names):
    formats = [FORMATS[name] for name in names]
    base, tuned = sample(names, DEVICE_TILE + 777, "tame")
    scan = Scan(*formats)
    seen, _ = oracle(scan, base, tuned)
    shift = 48 if formats[2].bits == 64 else 16
    wide = formats[2].bits > 16
    weights = tuple(np.argsort(seen.weights[1])[-3:].tolist()) if wide else ()
    deltas = tuple(np.argsort(seen.deltas[0].view(np.int64))[-2:].tolist())
    targets = Targets(shift, deltas, weights, (1e-4, 1e-6), (1e-5, 0.0))
    got, expected = run_refine(libraries(*names), scan, targets, base, tuned), Refined.empty(targets)
    ReferenceBackend().refine(scan, targets, in_memory(base, tuned), expected)
    for name in ("deltas", "weights", "within"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    np.testing.assert_allclose(got.tails, expected.tails, rtol=1e-12)
    assert expected.deltas.sum() > 0


@pytest.mark.parametrize("first_tie", [0, 12_345])
@pytest.mark.parametrize("name", ["f32", "f64", "bf16"])
def test_top_takes_its_share_of_ties_in_row_major_order(libraries, name, first_tie):
    format, n = FORMATS[name], 2 * DEVICE_TILE + 4099
    rng = np.random.default_rng(first_tie)
    base = np.zeros(n, format.code_dtype)
    one = 0x3F80 if name == "bf16" else np.array(1.0, f"f{format.bits // 8}").view(format.code_dtype)
    two = 0x4000 if name == "bf16" else np.array(2.0, f"f{format.bits // 8}").view(format.code_dtype)
    tuned = rng.choice(np.array([0, 0, one, one, two], format.code_dtype), n)
    tuned |= rng.integers(0, 2, n).astype(format.code_dtype) << format.code_dtype.type(format.bits - 1)
    ties = int(np.count_nonzero(tuned & format.code_dtype.type(format.magnitude) == one))
    for take in (0, 1, ties // 3, ties):
        scan = Scan(format, format, format, EPS, 1e-3, Rule.TOP, 1.0, ties, take, want_mask=True)
        agree(libraries(name, name, name), scan, base, tuned, first_tie, blocks=1 + take % 3, seed=take)


def test_an_update_that_grows_to_infinity_is_left_out_of_sums(libraries):
    format = FORMATS["bf16"]
    base, tuned = np.array([0x7F7F, 0x3F80], np.uint16), np.array([0xFF7F, 0x4000], np.uint16)
    for rule in (Rule.ABOVE, Rule.ETA, Rule.BITWISE, Rule.NONE):
        scan = Scan(format, format, format, (1e-5,), 1e-3, rule, 1e-5, want_mask=True)
        agree(libraries("bf16", "bf16", "bf16"), scan, base, tuned)


def test_a_threshold_belongs_to_what_is_within_it(libraries):
    format = FORMATS["f32"]
    base, tuned = np.zeros(3, np.float32), np.array([1.0, np.nextafter(np.float32(1), np.float32(2)), 0.5], np.float32)
    scan = Scan(format, format, format, (0.5, 1.0, 1.0 + 2**-30), 0.0, Rule.ABOVE, 1.0, want_mask=True)
    got, mask = run_scan(libraries("f32", "f32", "f32"), scan, base.view(np.uint32), tuned.view(np.uint32))
    assert got.within.tolist() == [1, 2, 2]
    assert mask.tolist() == [0b010]


def test_eta_belongs_to_what_is_within_it(libraries):
    format = FORMATS["f32"]
    base, tuned = np.array([1.0, 1.0], np.float32), np.array([2.0, 2.5], np.float32)
    scan = Scan(format, format, format, (0.5,), 0.5, Rule.ETA, 0.5, want_mask=True)
    got, mask = run_scan(libraries("f32", "f32", "f32"), scan, base.view(np.uint32), tuned.view(np.uint32))
    assert got.counts[Count.WITHIN_ETA] == 1
    assert mask.tolist() == [0b10]


def test_harvest_finds_every_bin_in_use(libraries):
    rng = np.random.default_rng(1)
    rows = np.where(rng.random(100_003) < 0.1, rng.integers(1, 1 << 60, 100_003), 0).astype(np.uint64)
    rows[[0, -1]] = 1, 2
    used, found = np.zeros(rows.size, BIN), np.zeros(1, np.uint32)
    libraries(*TESTED[0]).launch("harvest", 3, [rows, np.uint64(rows.size), used, [found]])
    used = np.sort(used[: found[0]], order="place")
    np.testing.assert_array_equal(used["place"], np.flatnonzero(rows))
    np.testing.assert_array_equal(used["count"], rows[rows > 0])
