"""The json object keeps the output contract."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from ckptdiff.figures.result import Diff
from ckptdiff.report.as_json import document
from ckptdiff.report.rows import View
from ckptdiff.report.text import dumps

_KEYS = [
    *("schema", "ckptdiff_version", "base", "tuned", "compare", "mask_rule", "counts", "coverage"),
    *("global", "median_2d"),
    *("modules", "layers", "blocks", "towers", "warnings", "tensors"),
    *("only_in_base", "only_in_tuned", "aliased", "mismatched", "suggested_map"),
]
_METRICS = {
    *("unchanged_null", "absorbed_energy", "patch_bytes", "dense_bytes"),
    *("unchanged_bitwise", "unchanged_stored", "unchanged_eta", "unchanged_abs", "unchanged_rel", "changed"),
    *("delta_norm", "base_norm", "tuned_norm", "rel_norm", "delta_energy_share", "cosine", "l1", "mean", "max_abs"),
    *("coord_energy", "low_coverage", "low_coverage_null", "nonfinite_base", "nonfinite_tuned"),
}


def test_keys_of_the_contract(diff: Diff) -> None:
    result = document(diff)
    assert list(result) == _KEYS
    assert result["schema"] == "ckptdiff.diff/1"
    assert set(result["global"]) == set(result["median_2d"]) == _METRICS
    assert set(result["modules"][0]) == _METRICS | {"module_type", "tensors", "numel"}
    assert set(result["layers"][0]) == _METRICS | {"tower", "layer", "tensors", "numel"}
    assert set(result["blocks"][0]) == _METRICS | {"block", "tensors", "numel"}
    assert set(result["towers"][0]) == _METRICS | {"tower", "tensors", "numel"}
    tensor = _METRICS | {"name", "shape", "dtype_base", "dtype_tuned", "compare", "numel", "tower", "layer"}
    assert set(result["tensors"][0]) == tensor | {"module_type", "block"}
    cells = document(diff, View("layer,module"))["layer_modules"]
    assert set(cells[0]) == _METRICS | {"tower", "layer", "module_type", "tensors", "numel"}
    assert list(result["global"]["unchanged_abs"]) == ["0", "1e-08", "1e-07", "1e-06", "1e-05", "0.0001"]
    assert list(result["global"]["low_coverage"]) == ["0.01", "0.05", "0.1", "0.2"]


def test_global_figures_are_sums_over_tensors(diff: Diff) -> None:
    columns, figures = diff.columns, document(diff)["global"]
    numel = int(columns["numel"].sum())
    assert figures["unchanged_bitwise"] == int(columns["unchanged_bitwise"].sum()) / numel
    assert figures["unchanged_abs"]["1e-05"] == int(columns["unchanged_abs_1e-05"].sum()) / numel
    ratio = math.sqrt(float((columns["delta_norm"] ** 2).sum()) / float((columns["base_norm"] ** 2).sum()))
    assert figures["rel_norm"] == pytest.approx(ratio, rel=1e-12)
    assert figures["delta_energy_share"] == 1.0
    assert sum(row["delta_energy_share"] for row in document(diff)["modules"]) == pytest.approx(1.0)


def test_what_is_left_out_is_listed(troubled_diff: Diff) -> None:
    result = document(troubled_diff)
    assert result["counts"] == {
        "matched": 6,
        "same_bytes": 1,
        "unread": 0,
        "only_in_base": 4,
        "only_in_tuned": 1,
        "mismatched": 1,
        "aliased": 1,
    }
    assert result["aliased"] == [{"name": "lm_head.weight", "of": "model.embed_tokens.weight"}]
    assert result["mismatched"][0]["tuned"] == {"dtype": "BF16", "shape": [9, 2]}
    assert [row.get("tuned_name") for row in result["tensors"]][:2] == [None, "visual.blocks.0.attn.qkv.weight"]
    assert "tuned_name" not in result["tensors"][0]


def test_undefined_figures_are_null(troubled_diff: Diff) -> None:
    tensors = {row["name"]: row for row in document(troubled_diff)["tensors"]}
    assert tensors["empty"]["unchanged_bitwise"] is None
    assert tensors["position_ids"]["unchanged_bitwise"] == 0.5
    assert tensors["position_ids"]["rel_norm"] is None


def test_groups_are_listed_only_if_the_user_gave_some(make_diff, make_facts) -> None:
    facts = make_facts("model.layers.0.mlp.up_proj.weight", (8, 8), groups=("ffn0",))
    assert "groups" not in document(make_diff())
    grouped = make_diff(tensors=[(facts, 0.5)], options={"groups": ["ffn0=up"]})
    assert [row["group"] for row in document(grouped)["groups"]] == ["ffn0"]
    assert document(grouped)["tensors"][0]["groups"] == ["ffn0"]
    assert document(make_diff(options={"groups": ["none=xyz"]}))["groups"] == []


def test_a_view_sorts_and_cuts_one_list(diff: Diff) -> None:
    whole = document(diff)
    cut = document(diff, View("module", "rel_norm", 2))
    assert len(cut["modules"]) == 2 and cut["tensors"] == whole["tensors"]
    assert len(document(diff, View(top=2))["tensors"]) == 2


def test_json_is_strict_even_for_odd_numbers() -> None:
    text = dumps({"a": [math.nan, math.inf, 1.5], "b": {"c": -math.inf}, "\u202e": "\x1b"})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse) == {"a": [None, None, 1.5], "b": {"c": None}, "\u202e": "\x1b"}
    assert text.isascii() and text.isprintable()


def test_a_document_is_plain_json(troubled_diff: Diff) -> None:
    result = document(troubled_diff)
    assert json.loads(dumps(result)) == result
    assert not any(isinstance(value, np.generic) for row in result["tensors"] for value in row.values())
