"""Rows come in the order asked for, undefined figures last."""

from __future__ import annotations

import pytest

from ckptdiff.errors import OptionError
from ckptdiff.figures.catalogue import FIGURES
from ckptdiff.figures.members import GROUPINGS
from ckptdiff.figures.result import Diff
from ckptdiff.figures.spectral import SPECTRAL_FIGURES
from ckptdiff.report.rows import View, figure_paths, flat_columns, flatten, rows


def test_tensors_keep_plan_order(diff: Diff) -> None:
    assert [row["name"] for row in rows(diff, View())] == [facts.name for facts in diff.tensors]


def test_figures_sort_from_large_to_small_and_undefined_last(troubled_diff: Diff) -> None:
    values = [row["rel_norm"] for row in rows(troubled_diff, View(sort="rel_norm"))]
    defined = [value for value in values if value is not None]
    assert defined == sorted(defined, reverse=True)
    assert None in values and values[len(defined) :] == [None] * (len(values) - len(defined))


def test_a_direction_turns_the_order(troubled_diff: Diff) -> None:
    values = [row["rel_norm"] for row in rows(troubled_diff, View(sort="rel_norm:asc"))]
    defined = [value for value in values if value is not None]
    assert defined == sorted(defined) and values[-1] is None


def test_labels_sort_from_small_to_large(diff: Diff) -> None:
    names = [row["name"] for row in rows(diff, View(sort="name"))]
    assert names == sorted(names)
    assert [row["layer"] for row in rows(diff, View("layer", sort="layer:desc"))] == [1, 0]


@pytest.mark.parametrize("key", ["unchanged_abs.1e-05", "unchanged_abs_1e-05"])
def test_parameters_sort_by_dotted_and_flat_keys(diff: Diff, key: str) -> None:
    values = [row["unchanged_abs"]["1e-05"] for row in rows(diff, View("module", sort=key))]
    assert values == sorted(values, reverse=True)


def test_top_cuts_after_sorting(diff: Diff) -> None:
    every = rows(diff, View(sort="delta_norm"))
    assert rows(diff, View(sort="delta_norm", top=3)) == every[:3]


@pytest.mark.parametrize("sort", ["nonsense", "", ":asc", "rel_norm:up", "unchanged_abs", "shape", "tensors"])
def test_unknown_sort_keys_are_refused(sort: str) -> None:
    with pytest.raises(OptionError, match="unknown sort key"):
        View(sort=sort)


@pytest.mark.parametrize("top", [0, -1])
def test_top_must_be_positive(top: int) -> None:
    with pytest.raises(OptionError, match="out of range"):
        View(top=top)


def test_every_figure_can_be_reached() -> None:
    paths = figure_paths()
    assert paths["unchanged_abs.0.0001"] == paths["unchanged_abs_0.0001"] == ("unchanged_abs", "0.0001")
    assert paths["spectral.stable_rank"] == ("spectral", "stable_rank")
    assert {path[0] for path in paths.values()} == {"spectral", *(figure.key for figure in FIGURES)}
    assert {path[1] for path in paths.values() if path[0] == "spectral"} == {figure.key for figure in SPECTRAL_FIGURES}


@pytest.mark.parametrize("by", GROUPINGS)
def test_flat_columns_hold_every_flattened_key(diff: Diff, by: str) -> None:
    columns = flat_columns(by)
    assert len(set(columns)) == len(columns)
    for row in rows(diff, View(by)):
        assert {key for key, _ in flatten(row)} <= set(columns)


def test_flatten_joins_parameters() -> None:
    assert dict(flatten({"a": 1, "b": {"1e-05": 2.0, "0": None}})) == {"a": 1, "b_1e-05": 2.0, "b_0": None}
