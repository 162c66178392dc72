from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from ckptdiff.figures.members import GROUPINGS
from ckptdiff.figures.result import Diff


def test_counts_of_tensors(troubled_diff: Diff) -> None:
    assert troubled_diff.counts == {
        "matched": 6,
        "same_bytes": 1,
        "unread": 0,
        "only_in_base": 4,
        "only_in_tuned": 1,
        "mismatched": 1,
        "aliased": 1,
    }


def still(make_diff: Callable, make_facts: Callable) -> Diff:
    return make_diff(tensors=[(make_facts("w", (4, 4)), 1.0), (make_facts("b", (4,)), 1.0)])


@pytest.mark.parametrize(
    "change", [{"only_in_base": ("x",)}, {"only_in_tuned": ("x",)}, {"mismatched": ("x",)}, {"aliased": ("x",)}]
)
def test_identical_unless_something_is_unmatched(make_diff: Callable, make_facts: Callable, change: dict) -> None:
    diff = still(make_diff, make_facts)
    assert diff.identical
    assert replace(diff, **change).identical == ("aliased" in change)


def test_identical_unless_weights_were_not_compared(make_diff: Callable, make_facts: Callable) -> None:
    diff = still(make_diff, make_facts)
    for side in ("base", "tuned"):
        assert not replace(diff, **{side: {"uncompared": ["2_Dense/model.safetensors"]}}).identical


def test_identical_unless_a_coordinate_changed(make_diff: Callable, make_facts: Callable) -> None:
    assert not make_diff(tensors=[(make_facts("w", (4, 4)), 0.9)]).identical
    integers = make_facts("ids", (4, 4), compare="bitwise", dtype_base="I64", dtype_tuned="I64")
    assert not make_diff(tensors=[(integers, 0.5)]).identical
    hidden = make_diff(tensors=[(make_facts("w", (10, 10), dtype_base="F32", dtype_tuned="F32"), 1.0)])
    assert hidden.overall["unchanged_bitwise"] == 1.0
    assert not hidden.identical, "changes that the cast hides are changes"


def test_overall_leaves_integers_out(troubled_diff: Diff) -> None:
    floats = troubled_diff.columns["valued"] > 0
    numel, equal = (troubled_diff.columns[name][floats].sum() for name in ("numel", "unchanged_bitwise"))
    assert troubled_diff.overall["unchanged_bitwise"] == pytest.approx(equal / numel)
    assert troubled_diff.per_tensor[-1]["unchanged_bitwise"] == 0.5


def test_groups_partition_the_floating_tensors(diff: Diff) -> None:
    for by in ("module", "block", "tower"):
        groups = diff.grouped(by)
        assert sum(group["tensors"] for group in groups) == len(diff.tensors)
        assert sum(group["numel"] for group in groups) == diff.columns["numel"].sum()
        assert sum(group["delta_energy_share"] or 0 for group in groups) == pytest.approx(1)
        assert sum(group["changed"] for group in groups) == diff.overall["changed"]


def test_groups_come_in_order_of_appearance(make_diff: Callable) -> None:
    diff = make_diff(layers=12)
    assert [group["module_type"] for group in diff.grouped("module")][:3] == ["embed_tokens", "norm", "q_proj"]
    assert [(group["tower"], group["layer"]) for group in diff.grouped("layer")] == [("language", i) for i in range(12)]
    seven = diff.grouped("layer")[7]
    rows = [row for row, tensor in enumerate(diff.tensors) if tensor.layer == 7]
    assert seven["tensors"] == len(rows)
    assert seven["l1"] == pytest.approx(diff.columns["l1"][rows].sum())


def test_layers_are_sorted_by_number_and_kept_apart_by_tower(make_diff: Callable, make_facts: Callable) -> None:
    names = [
        "model.layers.10.mlp.up_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        "visual.blocks.2.attn.qkv.weight",
    ]
    diff = make_diff(tensors=[(make_facts(name, (4, 4)), 0.5) for name in names])
    labels = [(group["tower"], group["layer"]) for group in diff.grouped("layer")]
    assert labels == [("language", 2), ("vision", 2), ("language", 10)]


def test_groups_of_the_user_may_overlap(make_diff: Callable, make_facts: Callable) -> None:
    tensors = [
        (make_facts("a", (4,), groups=("one", "two")), 0.5),
        (make_facts("b", (4,), groups=("two",)), 0.5),
        (make_facts("c", (4,)), 0.5),
    ]
    groups = make_diff(tensors=tensors).grouped("group")
    assert [(group["group"], group["tensors"]) for group in groups] == [("one", 1), ("two", 2)]


def test_medians_take_moved_matrices(make_diff: Callable, make_facts: Callable) -> None:
    shares = [0.1, 0.4, 0.8]
    tensors = [(make_facts(f"w{i}", (10, 10)), share) for i, share in enumerate(shares)]
    others = [
        (make_facts("norm", (10,)), 0.0),
        (make_facts("experts", (2, 5, 10)), 0.0),
        (make_facts("s", (9, 9)), 1.0),
    ]
    assert make_diff(tensors=tensors + others).median_2d["unchanged_bitwise"] == pytest.approx(np.median(shares))


def test_a_diff_of_nothing_has_no_figures(make_diff: Callable) -> None:
    diff = make_diff(tensors=[])
    assert diff.identical
    assert diff.overall["unchanged_bitwise"] is None
    assert diff.median_2d["rel_norm"] is None
    assert diff.per_tensor == []
    assert all(diff.grouped(by) == [] for by in GROUPINGS if by != "tensor")


def test_single_tensors_are_no_group(diff: Diff) -> None:
    with pytest.raises(ValueError, match="per_tensor"):
        diff.grouped("tensor")


def test_coverage_counts_what_each_tensor_compares(make_diff: Callable, make_facts: Callable) -> None:
    compared = [None, None, (6, 6), (0, 12), (12, 0), None]
    shapes = [(3, 4), (3, 4), (3, 4), (3, 4), (3, 4), (0, 7)]
    tensors = [
        (make_facts(f"w{at}", shape, compared=some), 1.0)
        for at, (shape, some) in enumerate(zip(shapes, compared, strict=True))
    ]
    diff = make_diff(tensors=tensors, base={"values": 99, "tied": 5}, tuned={"values": 98, "tied": 0})
    for side, values, tied in (("base", 99, 5), ("tuned", 98, 0)):
        found = diff.coverage[side]
        assert (found.values, found.compared) == (values, tied + sum(one.compared_of(side) for one in diff.tensors))
