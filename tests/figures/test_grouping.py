from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptdiff.figures.catalogue import COLUMNS, flat_key
from ckptdiff.figures.evaluate import figures_of, median_2d
from ckptdiff.figures.grouping import Grouping
from ckptdiff.measure.thresholds import RHO, P


def columns_of(rows: list[dict[str, float]]) -> dict[str, np.ndarray]:
    undefined = {"uint64": 0, "float64": math.nan}
    columns = {
        column.name: np.array([row.get(column.name, undefined[column.dtype]) for row in rows], column.dtype)
        for column in COLUMNS
    }
    added = {"value_bytes": math.nan, "unread": 0.0}
    return {**columns, **{name: np.array([row.get(name, usual) for row in rows]) for name, usual in added.items()}}


def test_bytes_of_an_update() -> None:
    """A coordinate that changed takes an index and a value; what changed as stored, not after the cast, is counted."""
    few = {"numel": 10, "valued": 1, "unchanged_bitwise": 7, "value_bytes": 2.0}
    cast = {**few, "wide": 1, "unchanged_stored": 4, "value_bytes": 4.0}
    many = {**few, "numel": (1 << 31) + 1, "unchanged_bitwise": 1 << 31}
    long = {**few, "numel": 1 << 31, "unchanged_bitwise": (1 << 31) - 1}
    unknown = {**few, "value_bytes": math.nan}
    rows = [few, cast, many, long, unknown, {**few, "valued": 0}]
    figures = grouped([*rows, few, cast, few, unknown], [*range(6), 6, 6, 7, 7], 8)
    found = [(row["patch_bytes"], row["dense_bytes"]) for row in figures]
    expected = [(3 * 6, 20), (6 * 8, 40), (2 + 8, (1 << 32) + 2), (2 + 4, 1 << 32), (None, None), (None, None)]
    assert found == [*expected, (18 + 48, 60), (None, None)]


def measured(base: np.ndarray, tuned: np.ndarray) -> dict[str, float]:
    """Columns of one tensor, by NumPy."""
    d = tuned - base
    same = d == 0
    energy = np.sort(d**2)[::-1]
    row = {
        "numel": base.size,
        "valued": 1,
        "finite": base.size,
        "unchanged_bitwise": same.sum(),
        "unchanged_eta": (np.abs(d) <= 1e-3 * np.maximum(np.abs(base), np.abs(tuned))).sum(),
        "unchanged_abs_1e-05": (np.abs(d) <= 1e-5).sum(),
        "changed": (~same).sum(),
        "masked": 1,
        "support": (~same).sum(),
        "delta_norm": np.linalg.norm(d),
        "base_norm": np.linalg.norm(base),
        "base_dot_delta": base @ d,
        "delta_sum": d.sum(),
        "l1": np.abs(d).sum(),
        "max_abs": np.abs(d).max(initial=0),
    }
    for p in P:
        count = max(1, math.ceil(p / 100 * base.size))
        row[flat_key("coord_energy", p)] = energy[:count].sum() / energy.sum() if energy.any() else math.nan
    for rho in RHO:
        low = np.argsort(np.abs(base))[: max(1, math.ceil(rho * base.size))]
        row[flat_key("low_coverage", rho)] = (~same)[low].sum() / (~same).sum() if not same.all() else math.nan
    return row


def tensors(seed: int, sizes: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    pairs = []
    for size in sizes:
        base = rng.normal(size=size)
        pairs.append((base, base + rng.normal(size=size) * 1e-3 * (rng.random(size) < 0.3)))
    return pairs


def grouped(rows: list[dict[str, float]], labels: list[int], size: int) -> list[dict[str, Any]]:
    energy = math.fsum(row["delta_norm"] ** 2 for row in rows if "delta_norm" in row)
    return figures_of(Grouping(columns_of(rows), np.array(labels, np.intp), size, energy))


@given(st.integers(0, 2**32), st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_a_group_of_tensors_is_one_long_tensor(seed: int, sizes: list[int]) -> None:
    pairs = tensors(seed, sizes)
    figures = grouped([measured(*pair) for pair in pairs], [0] * len(pairs), 1)[0]
    base, tuned = (np.concatenate(side) for side in zip(*pairs, strict=True))
    d = tuned - base
    assert figures["unchanged_bitwise"] == pytest.approx((d == 0).mean())
    assert figures["unchanged_abs"]["1e-05"] == pytest.approx((np.abs(d) <= 1e-5).mean())
    assert figures["changed"] == (d != 0).sum()
    assert isinstance(figures["changed"], int)
    assert figures["delta_norm"] == pytest.approx(np.linalg.norm(d))
    assert figures["tuned_norm"] == pytest.approx(np.linalg.norm(tuned))
    assert figures["rel_norm"] == pytest.approx(np.linalg.norm(d) / np.linalg.norm(base))
    assert figures["l1"] == pytest.approx(np.abs(d).sum())
    assert figures["mean"] == pytest.approx(d.mean(), abs=1e-15)
    assert figures["max_abs"] == np.abs(d).max()
    cosine = base @ tuned / np.linalg.norm(base) / np.linalg.norm(tuned)
    assert figures["cosine"] == pytest.approx(cosine, abs=1e-12)
    assert figures["delta_energy_share"] == (pytest.approx(1) if d.any() else None)
    assert figures["unchanged_stored"] is None


def test_the_distance_of_the_cosine_from_one_is_right_where_it_is_tiny() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=10_000)
    tuned = base + 1e-6 * rng.normal(size=base.size)
    wide_base, wide_tuned = base.astype(np.longdouble), tuned.astype(np.longdouble)
    exact = 1 - (wide_base @ wide_tuned) / np.sqrt(wide_base @ wide_base) / np.sqrt(wide_tuned @ wide_tuned)
    row = measured(base, tuned)
    n0, d2, dot = row["base_norm"], row["delta_norm"] ** 2, row["base_dot_delta"]
    assert 1 - grouped([row], [0], 1)[0]["cosine"] == pytest.approx(float(exact), rel=2e-3)
    n1 = math.sqrt(n0**2 + 2 * dot + d2)
    assert (d2 - ((2 * dot + d2) / (n0 + n1)) ** 2) / (2 * n0 * n1) == pytest.approx(float(exact), rel=1e-6)


def test_a_tensor_that_was_set_to_zero_has_no_norm_and_no_direction() -> None:
    rng = np.random.default_rng(0)
    for size in range(1, 400, 3):
        row = measured(base := rng.normal(size=size), np.zeros(size))
        row["base_dot_delta"] = math.fsum(-base * base)  # another order of adding than that of the norms
        figures = grouped([row], [0], 1)[0]
        assert (figures["tuned_norm"], figures["cosine"]) == (0.0, None)


@pytest.mark.parametrize("scale", [1e-9, 1e-6])
def test_the_cosine_with_a_vanishing_vector_is_null(scale: float) -> None:
    base = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    tuned = (scale * base).astype(np.float32)
    for pair in ((base, tuned), (tuned, base)):
        row = measured(*(side.astype(np.float64) for side in pair))
        row["base_dot_delta"] = pair[0].astype(np.float64) @ (pair[1] - pair[0]).astype(np.float64)
        row["delta_norm"] = np.linalg.norm((pair[1] - pair[0]).astype(np.float64))
        assert grouped([row], [0], 1)[0]["cosine"] is None


def test_shares_of_groups_are_weighted() -> None:
    pairs = tensors(1, [40, 400, 7])
    rows = [measured(*pair) for pair in pairs]
    both, last = grouped(rows, [0, 0, 1], 2)
    energies = [row["delta_norm"] ** 2 for row in rows]
    wanted = sum(rows[i]["coord_energy_1"] * energies[i] for i in (0, 1)) / (energies[0] + energies[1])
    assert both["coord_energy"]["1"] == pytest.approx(wanted)
    support = [row["support"] for row in rows]
    wanted = sum(rows[i]["low_coverage_0.1"] * support[i] for i in (0, 1)) / (support[0] + support[1])
    assert both["low_coverage"]["0.1"] == pytest.approx(wanted)
    assert both["delta_energy_share"] + last["delta_energy_share"] == pytest.approx(1)
    assert last["low_coverage"]["0.1"] == pytest.approx(rows[2]["low_coverage_0.1"])


def test_undefined_entries_do_not_count() -> None:
    moved, still = measured(*tensors(2, [50])[0]), measured(np.ones(50), np.ones(50))
    figures = grouped([moved, still], [0, 0], 1)[0]
    assert figures["low_coverage"]["0.1"] == pytest.approx(moved["low_coverage_0.1"])
    assert figures["coord_energy"]["5"] == pytest.approx(moved["coord_energy_5"])
    alone = grouped([still], [0], 1)[0]
    assert alone["cosine"] == 1.0
    assert alone["rel_norm"] == 0.0
    for key in ("delta_energy_share", "unchanged_stored"):
        assert alone[key] is None
    assert set(alone["low_coverage"].values()) == set(alone["coord_energy"].values()) == {None}


def test_an_empty_group_is_null_and_not_0_or_1() -> None:
    figures = grouped([measured(*tensors(3, [5])[0])], [0], 2)[1]
    cells = [cell for value in figures.values() for cell in (value.values() if isinstance(value, dict) else [value])]
    assert set(cells) == {None}


def test_a_tensor_without_coordinates_is_null() -> None:
    row = measured(np.zeros(0), np.zeros(0))
    figures = grouped([row], [0], 1)[0]
    assert figures["unchanged_bitwise"] is None
    assert figures["unchanged_abs"]["0"] is None
    assert figures["mean"] is None
    assert figures["changed"] == 0


@pytest.mark.parametrize("size", [0, 4])
def test_norms_and_shares_of_no_finite_coordinate_are_null(size: int) -> None:
    nothing = measured(np.zeros(0), np.zeros(0)) | {"numel": size, "changed": size}
    moved = measured(*tensors(5, [30])[0])
    alone, both = grouped([nothing, moved], [0, 1], 2)[0], grouped([nothing, moved], [0, 0], 1)[0]
    for key in ("delta_norm", "base_norm", "tuned_norm", "rel_norm", "delta_energy_share", "l1", "max_abs", "cosine"):
        assert alone[key] is None
        assert both[key] is not None
    assert both["delta_norm"] == pytest.approx(moved["delta_norm"])
    assert both["delta_energy_share"] == pytest.approx(1)


def test_integer_tensors_have_bitwise_figures_only() -> None:
    row = {"numel": 8, "unchanged_bitwise": 6, "changed": 2, "masked": 1}
    figures = grouped([row], [0], 1)[0]
    assert figures.pop("unchanged_bitwise") == 0.75
    assert figures.pop("changed") == 2
    cells = [cell for value in figures.values() for cell in (value.values() if isinstance(value, dict) else [value])]
    assert set(cells) == {None}


def test_no_mask_rule_and_no_cast_are_null() -> None:
    row = measured(*tensors(4, [20])[0])
    assert grouped([{**row, "masked": 0}], [0], 1)[0]["changed"] is None
    wide = {**row, "wide": 1, "unchanged_stored": 5}
    assert grouped([wide], [0], 1)[0]["unchanged_stored"] == 0.25
    narrow = {**row, "unchanged_stored": 20}
    assert grouped([wide, narrow], [0, 0], 1)[0]["unchanged_stored"] == 25 / 40


def test_medians_leave_out_what_did_not_move_and_what_is_not_a_matrix() -> None:
    pairs = tensors(5, [30, 40, 50, 60])
    rows = [measured(*pair) for pair in pairs] + [measured(np.ones(5), np.ones(5))]
    groups = Grouping(columns_of(rows), np.arange(5), 5, 1.0)
    row = median_2d(groups, np.array([True, True, True, False, True]))
    rel = [measured(*pair)["delta_norm"] / measured(*pair)["base_norm"] for pair in pairs[:3]]
    assert row["rel_norm"] == pytest.approx(np.median(rel))
    assert row["low_coverage"]["0.1"] == pytest.approx(np.median([row["low_coverage_0.1"] for row in rows[:3]]))
    assert isinstance(row["changed"], float)
    none = median_2d(groups, np.zeros(5, bool))
    assert none["rel_norm"] is None
    assert set(none["unchanged_abs"].values()) == {None}


@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=9))
def test_medians_are_those_of_numpy(values: list[float]) -> None:
    rows = [{"numel": 4, "valued": 1, "finite": 4, "delta_norm": 1.0, "l1": value} for value in values]
    groups = Grouping(columns_of(rows), np.arange(len(rows)), len(rows), 1.0)
    assert median_2d(groups, np.ones(len(rows), bool))["l1"] == np.median(values)


def test_a_sum_is_made_once_and_of_each_column_its_own() -> None:
    groups = Grouping(columns_of([{"l1": 3.0, "max_abs": 4.0}, {"l1": 5.0}]), np.array([0, 0]), 1, 1.0)
    for _ in range(2):
        assert (groups.total("l1"), groups.total_square("l1"), groups.total("max_abs")) == (8.0, 34.0, 4.0)
    assert groups.total("l1") is groups.total("l1")
