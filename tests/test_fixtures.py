"""The fixtures are what their generator writes, and the oracle behind their golden figures can be trusted."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from ckptdiff.checkpoint import open_checkpoint, pair
from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.checkpoint.same_values import look_for_ties
from ckptdiff.events import ignore

FOLDER = Path(__file__).parents[1] / "fixtures"
CASES = ("llama", "wide", "tied", "vlm", "moe", "fp8", "odd")
BF16 = np.dtype(ml_dtypes.bfloat16)


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


oracle = load("oracle")
codes16 = st.lists(st.integers(0, 65535), min_size=1, max_size=7)


def bf16(*values: float) -> np.ndarray:
    return np.array(values, np.float32).astype(BF16)


TRAINED = "addition/"
"""Not written by the generator: a model was trained for it (bench/opd_study/fixture.py)."""


def committed() -> dict[str, bytes]:
    found = (path for path in FOLDER.rglob("*") if path.is_file() and path.suffix in (".safetensors", ".json"))
    return {path.relative_to(FOLDER).as_posix(): path.read_bytes() for path in found}


def without_nulls(golden: bytes) -> tuple[object, list[float]]:
    """Golden figures, and apart from them those of the rounding null, which no platform fixes to the last digit."""
    tree = json.loads(golden)
    nulls = []
    for compare in ("bf16", "stored"):
        for row in (tree[compare]["global"], *tree[compare]["tensors"]):
            found = [*row.pop("low_coverage_null").values(), row.pop("unchanged_null")]
            nulls += [math.nan if f is None else f for f in found]
    return tree, nulls


@pytest.mark.slow
def test_generator_reproduces_the_committed_files():
    made = load("generate").fixture_files()
    found = {name: content for name, content in committed().items() if not name.startswith(TRAINED)}
    assert made.keys() == found.keys()
    for name, content in made.items():
        if name.startswith("golden/"):
            (tree, nulls), (tree_found, nulls_found) = without_nulls(content), without_nulls(found[name])
            assert tree == tree_found, name
            assert nulls == pytest.approx(nulls_found, rel=1e-9, nan_ok=True), name
        else:
            assert content == found[name], name


def test_fixtures_stay_small():
    assert sum(map(len, committed().values())) < 1.8e6


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.safetensors")), ids=lambda p: str(p.relative_to(FOLDER)))
def test_safetensors_reads_what_the_oracle_reads(path):
    content = path.read_bytes()
    ours = oracle.parse(content)
    theirs = dict(safetensors.deserialize(content))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert list(tensor.shape) == theirs[name]["shape"]
        assert tensor.values.tobytes() == bytes(theirs[name]["data"])


@pytest.mark.parametrize("case", CASES)
def test_index_names_every_tensor_where_it_is(case):
    for index in (FOLDER / case).rglob("*.index.json"):
        shards = {path.name: oracle.parse(path.read_bytes()) for path in index.parent.glob("*.safetensors")}
        assert json.loads(index.read_bytes())["weight_map"] == {
            name: file for file, tensors in shards.items() for name in tensors
        }


@pytest.mark.parametrize("case", CASES)
def test_pairing_finds_what_the_golden_results_expect(case):
    golden = json.loads((FOLDER / f"golden/{case}.json").read_bytes())
    sides = open_checkpoint(FOLDER / case / "base"), open_checkpoint(FOLDER / case / "tuned")
    with open_shards("pread") as shards:
        found = pair(*sides, same_values=look_for_ties(shards, ignore))
    expected = {(row["name"], row["tuned_name"]) for row in golden["bf16"]["tensors"]}
    assert {(pair.base.name, pair.tuned.name) for pair in found.pairs} == expected
    assert sorted(found.only_in_base) == sorted(golden["only_in_base"])
    assert sorted(found.only_in_tuned) == sorted(golden["only_in_tuned"])
    assert [{"name": alias.name, "of": alias.of} for alias in found.aliased] == golden["aliased"]
    assert sorted(mismatch.name for mismatch in found.mismatched) == sorted(golden["mismatched"])


def test_llama_update_has_the_structure_that_the_readme_shows():
    golden = json.loads((FOLDER / "golden/llama.json").read_bytes())["bf16"]
    equal = {row["name"]: row["unchanged_bitwise"] for row in golden["tensors"]}
    assert 0.70 < golden["global"]["unchanged_bitwise"] < 0.85
    assert {value for name, value in equal.items() if "norm" in name} == {1.0}
    for layer in range(4):
        at = f"model.layers.{layer}."
        assert equal[at + "mlp.up_proj.weight"] < equal[at + "self_attn.q_proj.weight"] - 0.1
    assert equal["model.layers.3.mlp.up_proj.weight"] < equal["model.layers.0.mlp.up_proj.weight"] - 0.2


@pytest.mark.parametrize("case", CASES)
def test_relative_threshold_equals_bit_equality_in_bf16(case):
    # METRICS: for bf16 any eta < 2^-8 must give unchanged_bitwise.
    golden = json.loads((FOLDER / f"golden/{case}.json").read_bytes())["bf16"]
    rows = [row for row in golden["tensors"] if row["compare_dtype"] == "BF16"]
    assert rows
    assert all(row["unchanged_eta"] == row["unchanged_bitwise"] for row in rows)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_cast_to_bf16_rounds_to_nearest_even(values):
    bits = np.array(values, np.float32).view(np.uint32).astype(np.uint64)
    expected = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    assert oracle.bits(oracle.cast(np.array(values, np.float32), "BF16")).tolist() == expected.tolist()


def test_float64_is_rounded_twice_on_its_way_to_bf16():
    assert float(oracle.cast(np.array([1 + 2**-8 + 2**-40]), "BF16")[0]) == 1.0


@pytest.mark.parametrize(
    ("base", "tuned", "in_bf16", "as_stored"),
    [
        ("F32", "F32", "BF16", "F32"),
        ("F16", "BF16", "BF16", "F32"),
        ("F16", "F16", "BF16", "F16"),
        ("F64", "F8_E5M2", "BF16", "F64"),
        ("F8_E4M3", "F8_E4M3", "F8_E4M3", "F8_E4M3"),
        ("F8_E4M3", "F8_E5M2", "BF16", "BF16"),
        ("F8_E4M3", "F16", "BF16", "F16"),
        ("BF16", "F8_E4M3", "BF16", "BF16"),
        ("F8_E4M3", "F32", "BF16", "F32"),
    ],
)
def test_compare_dtype(base, tuned, in_bf16, as_stored):
    assert oracle.compare_dtype(base, tuned, "bf16") == oracle.compare_dtype(tuned, base, "bf16") == in_bf16
    assert oracle.compare_dtype(base, tuned, "stored") == oracle.compare_dtype(tuned, base, "stored") == as_stored


def test_thresholds_are_inclusive_and_never_above_the_decimal():
    for eps in (1e-8, 1e-7, 1e-6, 1e-5, 1e-4):
        limit = np.float32(oracle.float_at_most(eps, np.dtype(np.float32)))
        assert float(limit) <= eps < float(np.nextafter(limit, np.float32(1)))
        w1 = np.array([limit, np.nextafter(limit, np.float32(1)), -limit], np.float32)
        assert oracle.within_abs(np.zeros(3, np.float32), w1, eps).tolist() == [True, False, True]


def test_special_values_are_unchanged_only_when_their_bits_agree():
    w0 = bf16(np.nan, np.nan, np.inf, np.inf, -0.0, 1, 0)
    w1 = bf16(np.nan, 1, np.inf, -np.inf, 0.0, 1, np.inf)
    expected = [True, False, True, False, True, True, False]
    for flags in (
        oracle.same_bits(w0, w1),
        oracle.within_abs(w0, w1, 1e9),
        oracle.within_eta(w0, w1, 1e-3),
        oracle.within_rel(w0, w1, 1e-2),
    ):
        assert flags.tolist() == expected
    assert oracle.tensor_sums(w0, w1)["finite"] == 2


def test_rms_is_over_the_coordinates_in_the_sums():
    w0, w1 = bf16(3, 4, np.inf, 100), bf16(3, 4.0625, 1, np.nan)
    rms = math.sqrt((9 + 16) / 2)
    assert oracle.within_rel(w0, w1, 0.0625 / rms * 1.0001).tolist() == [True, True, False, False]
    assert oracle.within_rel(w0, w1, 0.0625 / rms * 0.9999).tolist() == [True, False, False, False]


def test_coord_energy_takes_at_least_one_coordinate():
    w0, w1 = np.zeros(100, np.float32), np.zeros(100, np.float32)
    w1[:3] = 3, -4, 12
    assert oracle.coord_energy(w0, w1, 0.1) == 144 / 169
    assert oracle.coord_energy(w0, w1, 1.0) == 144 / 169
    assert oracle.coord_energy(w0, w1, 1.01) == 160 / 169
    assert oracle.coord_energy(w0, w0, 1.0) is None


@given(codes16, st.data(), st.sampled_from([0.1, 0.3, 0.5]))
def test_low_coverage_is_the_mean_over_the_orders_of_ties(codes, data, rho):
    # Few distinct codes, so that ties abound.
    w0 = np.array([code % 3 * 0x3F80 for code in codes], np.uint16).view(BF16)
    changed = data.draw(st.lists(st.booleans(), min_size=len(codes), max_size=len(codes)))
    w1 = np.where(changed, w0 + np.float32(0.5), w0.astype(np.float32)).astype(BF16)
    count = oracle.low_count(len(codes), rho)
    magnitude = np.abs(w0.astype(float))
    moved = ~oracle.same_bits(w0, w1)
    overlaps = [
        sum(moved[i] for i in sorted(order, key=lambda i: magnitude[i])[:count])
        for order in itertools.permutations(range(len(codes)))
    ]
    overlap, total = oracle.low_overlap(w0, w1, rho)
    assert total == moved.sum()
    assert overlap == pytest.approx(np.mean(overlaps))


def test_low_set_leaves_nan_out_and_ranks_infinity_highest():
    w0, w1 = bf16(np.nan, np.inf, 2, 1), bf16(1, 1, 1, 2)
    assert oracle.low_overlap(w0, w1, 0.5) == (2.0, 3)
    assert oracle.low_overlap(w0, w1, 1.0) == (3.0, 3)


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16), np.dtype(ml_dtypes.float8_e4m3fn)])
def test_rounding_null_predicts_a_gaussian_update(dtype):
    random = np.random.default_rng(0)
    w0 = random.normal(0, 0.05, 100_000).astype(np.float32).astype(dtype)
    sigma = 0.01 * float(ml_dtypes.finfo(dtype).eps)
    w1 = (w0.astype(np.float64) + random.normal(0, sigma, w0.size)).astype(np.float32).astype(dtype)
    assert 0.05 < oracle.same_bits(w0, w1).mean() < 0.95
    rhos = (0.05, 0.1, 0.2)
    for rho, null in zip(rhos, oracle.low_coverage_null(w0, w1, rhos), strict=True):
        assert null == pytest.approx(oracle.low_coverage(w0, w1, rho), rel=0.03)
    assert oracle.unchanged_null(w0, w1, 0.0) == pytest.approx(oracle.same_bits(w0, w1).mean(), abs=6e-3)


def test_rounding_null_needs_a_changed_and_an_unchanged_weight():
    w0 = bf16(1, 2, 3)
    assert oracle.low_coverage_null(w0, w0, [0.1]) == [None]
    assert oracle.low_coverage_null(w0, bf16(2, 3, 4), [0.1]) == [None]
    assert oracle.low_coverage_null(w0.astype(np.float32), bf16(2, 2, 3).astype(np.float32), [0.1]) == [None]


@pytest.mark.parametrize("name", ["BF16", "F16", "F8_E4M3", "F8_E5M2"])
def test_half_gaps_are_half_way_to_the_neighbours(name):
    dtype = oracle.FLOATS[name]
    up, down = oracle.half_gaps(dtype)
    values = np.arange(up.size, dtype=f"u{dtype.itemsize}").view(dtype).astype(float)
    assert np.isfinite(values).all()
    assert (values[:-1] + 2 * up[:-1] == values[1:]).all()
    assert (values[1:] - 2 * down[1:] == values[:-1]).all()
    assert down[0] == up[0]
    assert up[-1] == down[-1]


def test_ulp_histogram_crosses_zero_and_leaves_the_unchanged_out():
    tiny = np.array([0x0001, 0x8001, 0x0000, 0x3F80, 0x3F80, 0x7F80, 0x7F7F], np.uint16).view(BF16)
    moved = np.array([0x8001, 0x8003, 0x8000, 0x3F81, 0x3F80, 0x3F80, 0xFF7F], np.uint16).view(BF16)
    # Distances 2, 2, (equal), 1, (equal), (infinite), 2 * 0x7F7F = 65278.
    assert oracle.ulp_histogram(tiny, moved) == [1, 2] + [0] * 13 + [1]
    lowest = np.array([-np.finfo(np.float64).max])
    assert oracle.ulp_histogram(lowest, -lowest)[63] == 1


@given(codes16)
def test_ulp_order_is_the_order_of_values(codes):
    w = np.array(codes, np.uint16).view(np.float16)
    w = w[~np.isnan(w)]
    order = oracle.ulp_order(w)
    for i, j in itertools.combinations(range(w.size), 2):
        assert np.sign(order[i] - order[j]) == np.sign(float(w[i] > w[j]) - float(w[i] < w[j]))
