from __future__ import annotations

import numpy as np
import pytest

from ckptdiff.figures.catalogue import COLUMNS, FIGURES, flat_key, flat_keys, parameter_key
from ckptdiff.measure.thresholds import EPS, ETA, RHO, TAU, P

# The keys of the output contract, in its order.
CONTRACT = """unchanged_bitwise unchanged_null unchanged_stored absorbed_energy unchanged_eta unchanged_abs
    unchanged_rel changed patch_bytes dense_bytes delta_norm base_norm tuned_norm rel_norm delta_energy_share
    cosine l1 mean max_abs coord_energy low_coverage low_coverage_null nonfinite_base nonfinite_tuned"""


def test_figures_are_those_of_the_output_contract() -> None:
    assert [figure.key for figure in FIGURES] == CONTRACT.split()
    assert all(figure.long_name and figure.source for figure in FIGURES)


def test_parameters_are_the_published_ones() -> None:
    assert [parameter_key(eps) for eps in EPS] == ["0", "1e-08", "1e-07", "1e-06", "1e-05", "0.0001"]
    assert [parameter_key(tau) for tau in TAU] == ["0.0001", "0.001", "0.01"]
    assert [parameter_key(p) for p in P] == ["0.1", "1", "5"]
    assert [parameter_key(rho) for rho in RHO] == ["0.01", "0.05", "0.1", "0.2"]
    assert parameter_key(ETA) == "0.001"


def test_flat_keys_name_every_value_once() -> None:
    keys = [key for figure in FIGURES for _, key in flat_keys(figure)]
    assert len(keys) == len(set(keys))
    assert "unchanged_abs_1e-05" in keys
    assert "low_coverage_0.1" in keys
    assert flat_key("cosine", None) == "cosine"
    by_key = {figure.key: list(flat_keys(figure)) for figure in FIGURES}
    assert by_key["cosine"] == [(None, "cosine")]
    assert by_key["coord_energy"] == [(0.1, "coord_energy_0.1"), (1.0, "coord_energy_1"), (5.0, "coord_energy_5")]


def test_columns_are_described_once() -> None:
    names = [column.name for column in COLUMNS]
    assert len(names) == len(set(names))
    assert {column.dtype for column in COLUMNS} == {"uint64", "float64"}
    assert all(column.units and column.long_name for column in COLUMNS)


@pytest.mark.parametrize("key", ["unchanged_abs", "unchanged_rel", "coord_energy", "low_coverage", "low_coverage_null"])
def test_figures_with_parameters_have_their_columns(key: str) -> None:
    figure = next(figure for figure in FIGURES if figure.key == key)
    assert {flat for _, flat in flat_keys(figure)} <= {column.name for column in COLUMNS}


def test_counts_hold_a_trillion_coordinates() -> None:
    assert all(np.dtype(column.dtype).itemsize == 8 for column in COLUMNS)
