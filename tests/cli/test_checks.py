"""``--fail-if``: keys of the json report, checked before the run as far as they can be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptdiff.cli.checks import Check
from ckptdiff.errors import OptionError
from ckptdiff.figures.catalogue import FIGURES
from ckptdiff.figures.result import Diff
from ckptdiff.report.as_json import document
from ckptdiff.report.rows import figure_paths

_SINGLE = [figure.key for figure in FIGURES if not figure.parameters]


@pytest.mark.parametrize("text", [
    "global.unchanged_abs.1e-05<0.5",
    "global.unchanged_abs.0.0001 >= 1",
    "global.unchanged_abs_1e-05<0.5",
    "median_2d.rel_norm==1e-3",
    "counts.only_in_base>0",
    "modules.q_proj.rel_norm>0.1",
    "layers.3.low_coverage.0.1!=2",
    "layers.vision.3.tensors>1",
    "tensors.model.layers.0.mlp.up_proj.weight.numel<=5",
    "tensors.a<b.c>d.max_abs<1",
    "groups.mine.rel_norm<1",
])  # fmt: skip
def test_checks_that_can_be(text: str) -> None:
    assert Check.parse(text).text == text


@pytest.mark.parametrize("text", ["", "global.rel_norm", "global.rel_norm<", "<0.5", "global.rel_norm<many", "a=1",
                                  "global.rel_norm<nan", "global.rel_norm<<1"])  # fmt: skip
def test_what_is_no_check(text: str) -> None:
    with pytest.raises(OptionError):
        Check.parse(text)


@pytest.mark.parametrize("key", ["global", "global.nonsense", "global.unchanged_abs", "global.unchanged_abs.1e-5",
                                 "nonsense.rel_norm",
                                 "counts.nonsense", "modules.q_proj", "modules..rel_norm", "tensors.rel_norm",
                                 "tensors.x.tensors", "global.numel", "only_in_base", "compare"])  # fmt: skip
def test_unknown_keys(key: str) -> None:
    with pytest.raises(OptionError, match="unknown key"):
        Check.parse(f"{key}<1")


@pytest.mark.parametrize(("key", "nearest"), [
    ("globl.rel_norm", "global.rel_norm"),
    ("global.unchanged_abs.1e-5", "global.unchanged_abs.1e-05"),
    ("count.matched", "counts.matched"),
    ("module.q_proj.rel_norm", "modules.q_proj.rel_norm"),
    ("layers.3.lowcoverage.0.1", "layers.3.low_coverage.0.1"),
    ("tensors.model.layers.0.mlp.up_proj.weight.relnorm", "tensors.model.layers.0.mlp.up_proj.weight.rel_norm"),
    ("median_2d.spectral.topk_energy.15", "median_2d.spectral.topk_energy.16"),
    ("nonsense", None),
])  # fmt: skip
def test_an_unknown_key_names_the_nearest(key: str, nearest: str | None) -> None:
    with pytest.raises(OptionError) as caught:
        Check.parse(f"{key}<1")
    if nearest is None:
        assert caught.value.hint is None
    else:
        assert nearest in str(caught.value.hint).removeprefix("nearest: ").split(", ")


@given(st.sampled_from(sorted(figure_paths())), st.sampled_from(["<", "<=", ">", ">=", "==", "!="]),
       st.floats(allow_nan=False), st.text(min_size=1).filter(lambda name: name == name.strip()))  # fmt: skip
def test_any_figure_of_any_tensor(figure: str, operator: str, number: float, name: str) -> None:
    check = Check.parse(f"tensors.{name}.{figure}{operator}{number!r}")
    assert (check.operator, check.number) == (operator, number)
    assert check.key == f"tensors.{name}.{figure}"


def test_values_are_those_of_the_document(troubled_diff: Diff) -> None:
    result = document(troubled_diff)

    def value(key: str) -> float | None:
        return Check.parse(f"{key}<0").value(troubled_diff)

    assert value("counts.only_in_base") == 4
    assert value("global.unchanged_abs.1e-05") == result["global"]["unchanged_abs"]["1e-05"]
    assert value("median_2d.unchanged_bitwise") == result["median_2d"]["unchanged_bitwise"]
    for row in result["modules"]:
        assert value(f"modules.{row['module_type']}.unchanged_rel.0.01") == row["unchanged_rel"]["0.01"]
        assert value(f"modules.{row['module_type']}.tensors") == row["tensors"]
    for row in result["tensors"]:
        assert value(f"tensors.{row['name']}.low_coverage.0.1") == row["low_coverage"]["0.1"]
        assert value(f"tensors.{row['name']}.numel") == row["numel"]
    layer = {(row["tower"], row["layer"]): row for row in result["layers"]}
    assert value("layers.0.rel_norm") == value("layers.language.0.rel_norm") == layer["language", 0]["rel_norm"]
    assert value("layers.vision.0.rel_norm") == layer["vision", 0]["rel_norm"]
    assert value("layers.vision.0.rel_norm") != value("layers.0.rel_norm")


@pytest.mark.parametrize(("condition", "failed"), [
    ("<4", False), ("<=4", True), (">4", False), (">=4", True), ("==4", True), ("!=4", False), (" > 3.5 ", True),
    ("<inf", True),
])  # fmt: skip
def test_operators(troubled_diff: Diff, condition: str, failed: bool) -> None:
    assert Check.parse(f"counts.only_in_base{condition}").failed(troubled_diff) is failed


def test_an_undefined_figure_is_trouble(troubled_diff: Diff) -> None:
    for key in ("tensors.empty.rel_norm", "modules.router.rel_norm"):
        with pytest.raises(OptionError, match="undefined"):
            Check.parse(f"{key}<1").failed(troubled_diff)


@pytest.mark.parametrize("key", _SINGLE)
def test_members_are_known_before_the_run(diff: Diff, key: str) -> None:
    for member in (
        "modules.q_proj",
        "layers.1",
        "layers.language.0",
        "blocks.ffn",
        "towers.language",
        "tensors.model.norm.weight",
        "layer_modules.1.up_proj",
        "layer_modules.language.1.up_proj",
    ):
        Check.parse(f"{member}.{key}<1").require_member(diff.tensors)
    for member in (
        "modules.router",
        "layers.2",
        "layers.vision.0",
        "blocks.x",
        "towers.vision",
        "tensors.norm",
        "groups.x",
    ):
        with pytest.raises(OptionError, match="nothing of that name"):
            Check.parse(f"{member}.{key}<1").require_member(diff.tensors)
    Check.parse(f"global.{key}<1").require_member(diff.tensors)
    for member, nearest in (
        ("modules.qproj", "modules.q_proj"),
        ("layer_modules.1.upproj", "layer_modules.1.up_proj"),
        ("tensors.model.layers.0.mlp.up_proj", "tensors.model.layers.0.mlp.up_proj.weight"),
        ("modules.zzz", ""),
    ):
        with pytest.raises(OptionError) as caught:
            Check.parse(f"{member}.{key}<1").require_member(diff.tensors)
        hint = str(caught.value.hint or "nearest: ")
        assert nearest in hint.removeprefix("nearest: ").split(", ")
