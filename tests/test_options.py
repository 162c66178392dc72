from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptdiff.errors import OptionError
from ckptdiff.options import MaskRule, Options, default_threads, parse_size


@pytest.mark.parametrize(
    ("text", "rule", "shown"),
    [
        ("abs:1e-5", MaskRule("abs", 1e-5), "abs:1e-05"),
        ("abs:0", MaskRule("abs", 0.0), "abs:0"),
        ("eta:.001", MaskRule("eta", 1e-3), "eta:0.001"),
        ("rel:1e-3", MaskRule("rel", 1e-3), "rel:0.001"),
        ("top:20", MaskRule("top", 20.0), "top:20"),
        ("top:100", MaskRule("top", 100.0), "top:100"),
        ("bitwise", MaskRule("bitwise"), "bitwise"),
        ("none", MaskRule("none"), "none"),
    ],
)
def test_mask_rules(text: str, rule: MaskRule, shown: str) -> None:
    assert MaskRule.parse(text) == rule
    assert str(rule) == shown


@given(st.sampled_from(["abs", "eta", "rel"]), st.floats(0, allow_infinity=False, allow_nan=False))
def test_mask_rules_keep_every_digit(kind: str, value: float) -> None:
    rule = MaskRule.parse(f"{kind}:{value!r}")
    assert MaskRule.parse(str(rule)) == rule


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ABS:1",
        "abs",
        "abs:",
        "abs:x",
        "abs:-1",
        "abs:nan",
        "abs:inf",
        "top:0",
        "top:101",
        "none:1",
        "bitwise:",
        "x:1",
    ],
)
def test_invalid_mask_rules(text: str) -> None:
    with pytest.raises(OptionError, match="mask rule") as caught:
        MaskRule.parse(text)
    assert caught.value.expected
    assert caught.value.found == text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("400M", 400 << 20),
        ("2GiB", 2 << 30),
        ("1.5g", 3 << 29),
        (" 7 kb ", 7 << 10),
        ("12", 12),
        ("1T", 1 << 40),
        (".5K", 512),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "M", "1e3", "400 X", "0.1", "1..2", "9" * 400, "9" * 18 + "T"])
def test_invalid_sizes(text: str) -> None:
    with pytest.raises(OptionError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compare": "fp16"}, "unknown value of compare"),
        ({"device": "tpu"}, "unknown value of device"),
        ({"io": "aio"}, "unknown value of io"),
        ({"threads": -1}, "threads out of range"),
        ({"threads": 5000}, "threads out of range"),
        ({"groups": ("no equals sign",)}, "not a group"),
        ({"groups": ("=x",)}, "not a group"),
        ({"groups": ("x=",)}, "not a group"),
        ({"groups": ("x=(",)}, "invalid regex of group 'x'"),
        ({"groups": ("x=a{99999999999999999999}",)}, "invalid regex of group 'x'"),
    ],
)
def test_options_are_checked_when_made(options: dict, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Options(**options)


def test_groups_are_compiled_patterns() -> None:
    (name, pattern), (other, _) = Options(groups=("late=layers\\.[23]", "eq=a=b")).group_patterns()
    assert (name, other) == ("late", "eq")
    assert pattern.search("model.layers.2.w")
    assert not pattern.search("model.layers.1.w")


def test_options_survive_json() -> None:
    options = Options(mask=MaskRule("top", 20.0), include=("*.weight",)).as_json()
    assert json.loads(json.dumps(options)) == options
    assert options["mask"] == "top:20"
    assert options["include"] == ["*.weight"]


def test_default_threads_are_the_cores_allowed() -> None:
    assert 1 <= default_threads() <= (os.cpu_count() or 1)
