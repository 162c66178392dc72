"""The first lines tell a newcomer what changed, and that it depends on the cast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from ckptdiff.figures.result import Diff, UnmatchedTensor
from ckptdiff.report.summary import side_name, summary

MakeDiff = Callable[..., Diff]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("models/MiniLM-L6", "MiniLM-L6"),
        ("models/MiniLM-L6/", "MiniLM-L6"),
        ("MiniLM/model.safetensors", "MiniLM"),
        ("MiniLM/model.safetensors.index.json", "MiniLM"),
        ("tuned.safetensors", "tuned.safetensors"),
        ("rnn/tuned.safetensors", "rnn/tuned.safetensors"),
        ("rnn/instruct.safetensors", "instruct.safetensors"),
        ("llama/base", "llama/base"),
        ("/cache/hub/models--Qwen--Qwen3-4B/snapshots/0123abcd", "Qwen/Qwen3-4B"),
        ("model.safetensors", "model.safetensors"),
        ("a/model/model.safetensors", "a/model"),
        ("", ""),
    ],
)
def test_names_of_sides(path: str, name: str) -> None:
    assert side_name(path) == name


def wide(make_diff: MakeDiff, lost: float) -> Diff:
    """float32 on both sides, of which `lost` of the changes vanish in the cast."""
    diff = make_diff()
    tensors = tuple(replace(facts, dtype_base="F32", dtype_tuned="F32") for facts in diff.tensors)
    numel, equal = diff.columns["numel"].astype(float), diff.columns["unchanged_bitwise"].astype(float)
    stored = np.round(np.maximum(0, numel - (numel - equal) / max(1 - lost, 1e-9))).astype(np.uint64)
    absorbed = 0.4 * diff.columns["stored_norm"]
    wide = {"wide": np.ones_like(diff.columns["wide"]), "unchanged_stored": stored, "absorbed_norm": absorbed}
    columns = {**diff.columns, **wide}
    return replace(diff, tensors=tensors, columns=columns)


def test_both_figures_and_why_they_differ(make_diff: MakeDiff) -> None:
    lines = summary(wide(make_diff, 0.6))
    assert "stored F32, compared as BF16" in lines[1]
    diff = wide(make_diff, 0.6)
    cast, stored, null = (diff.overall[f"unchanged_{key}"] for key in ("bitwise", "stored", "null"))
    assert lines[2] == f"unchanged   {cast:.1%} in BF16 (noise of this size: {null:.1%})".replace("%", " %")
    energy = diff.overall["absorbed_energy"]
    expected = f"as stored   {stored:.1%}: most changes vanish in the cast ({energy:.1%} of sum d^2)"
    assert lines[3] == expected.replace("%", " %")


@pytest.mark.parametrize(
    ("lost", "text"),
    [(0.0, "as stored   the same"), (1e-5, "as stored   about the same"), (0.2, ": some changes vanish")],
)
def test_smaller_differences_have_other_words(make_diff: MakeDiff, lost: float, text: str) -> None:
    assert text in summary(wide(make_diff, lost))[3]


def test_narrow_checkpoints_have_no_stored_figure(diff: Diff) -> None:
    assert "as stored" not in "\n".join(summary(diff))


def test_coverage_stands_beside_null_and_chance(diff: Diff) -> None:
    assert "smallest 10 % of weights hold 31.0 % of changes (rounding 38.0 %, chance 10 %)" in summary(diff)


def test_everything_left_out_is_said(troubled_diff: Diff) -> None:
    text = "\n".join(summary(troubled_diff))
    for line in ("embeddings.position_ids (1 tensor)", "a (1 tensor)", "b (1 tensor)", "1 more tensor"):
        assert f"only in base: {line}\n" in text
    assert "only in tuned: extra (1 tensor)\n" in text
    assert "lm_head.weight is tied to model.embed_tokens.weight" in text
    sizes = "1 tensor, 0.39 % of base, 0.43 % of tuned"
    assert f"not compared: vocab ({sizes}): shapes differ: [8, 2] in base, [9, 2] in tuned" in text
    assert "warning: fp8 tensors are compared as raw codes" in text
    assert "1 tensor of integers or opaque codes" in text
    assert "stored F32+BF16" in text


def test_no_line_holds_an_escape_or_break(make_diff: MakeDiff) -> None:
    evil = "x\x1b[2J\ny"
    diff = make_diff(
        base={"path": evil}, only_in_base=(evil,), aliased=((evil, evil),), warnings=(evil,), mask_rule=evil
    )
    for line in summary(diff, evil):
        assert line.isprintable()


def test_the_next_command_can_be_pasted(diff: Diff) -> None:
    *_, following, pictures = summary(diff, "my run.h5")
    assert following.endswith("next: ckptdiff show 'my run.h5' --by tensor")
    assert pictures == "pictures: ckptdiff report 'my run.h5'"
    assert "next:" not in "".join(summary(diff, "my run.h5", overview=False))
    assert "-o run.h5" in summary(diff)[-1]
    assert "no masks" in "\n".join(summary(replace(diff, mask_rule="none"), "r.h5"))


def test_lines_fit_eighty_columns(make_diff: MakeDiff) -> None:
    for diff in (make_diff(), wide(make_diff, 0.6)):
        assert max(map(len, summary(diff, "run.h5"))) <= 80


def test_nothing_to_measure(make_diff: MakeDiff, make_facts: Callable[..., object]) -> None:
    ids = make_facts("position_ids", (1, 16), dtype_base="I64", dtype_tuned="I64", compare="bitwise")
    text = "\n".join(summary(make_diff(tensors=[(ids, 0.5)])))
    assert "nothing to measure" in text and "compared as" not in text


def test_nonfinite_values_are_said(make_diff: MakeDiff) -> None:
    diff = make_diff()
    counted = np.zeros(len(diff.tensors), np.uint64)
    counted[0] = 3
    text = "\n".join(summary(replace(diff, columns={**diff.columns, "nonfinite_tuned": counted})))
    assert "3 values NaN or Inf in tuned" in text and "in base" not in text


def test_equal_checkpoints_are_called_identical(diff: Diff) -> None:
    equal = dict.fromkeys(("unchanged_bitwise", "unchanged_stored"), diff.columns["numel"])
    assert any(line.startswith("identical:") for line in summary(replace(diff, columns={**diff.columns, **equal})))
    assert not any(line.startswith("identical:") for line in summary(diff))


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({"only_in_base": ("a",)}, "1 tensor is only in base"),
        (
            {"only_in_tuned": ("a", "b"), "only_in_base": ("c",)},
            "1 tensor is only in base, 2 tensors are only in tuned",
        ),
        ({"mismatched": (UnmatchedTensor("v", {}, {}, "no"),)}, "1 tensor is of another shape or dtype"),
        ({"tuned": {"uncompared": ["2_Dense/model.safetensors"]}}, "weights of tuned were not compared"),
    ],
)
def test_what_keeps_equal_values_from_being_identical(diff: Diff, change: dict, reasons: str) -> None:
    equal = dict.fromkeys(("unchanged_bitwise", "unchanged_stored"), diff.columns["numel"])
    lines = summary(replace(diff, columns={**diff.columns, **equal}, **change))
    assert f"not identical: no compared value differs, but {reasons}" in lines
    assert not any(line.startswith("not identical") for line in summary(replace(diff, **change)))


def test_a_tie_is_told_once(make_diff: MakeDiff) -> None:
    tied = (("lm_head.weight", "model.embed_tokens.weight"),)
    told = "lm_head.weight is stored only in tuned: tied to model.embed_tokens.weight by its config.json"
    lines = summary(make_diff(aliased=tied, warnings=(told,)))
    assert [line for line in lines if "lm_head" in line] == [f"warning: {told}"]
