"""Names cannot touch the terminal, and numbers never claim more than they are."""

from __future__ import annotations

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptdiff.errors import plural
from ckptdiff.report.text import binary_size, duration, number, percent, quantity, safe, shape_text, size

_DANGEROUS = {"Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn"}


@given(st.text(alphabet=st.characters(codec=None)))
def test_safe_leaves_no_character_that_acts(name: str) -> None:
    shown = safe(name)
    assert not {unicodedata.category(char) for char in shown} & _DANGEROUS
    assert "\n" not in shown and "\x1b" not in shown


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "S", "M"])))
def test_safe_leaves_readable_names_alone(name: str) -> None:
    assert safe(name) == name


def test_safe_spells_out_what_it_escapes() -> None:
    assert safe("a\x1b[31mb\n") == "a\\x1b[31mb\\x0a"
    assert safe("\u202egnp.exe") == "\\u202egnp.exe"
    assert safe("\U000e0041\x7f\x9b") == "\\U000e0041\\x7f\\x9b"
    assert safe("\udcff") == "\\udcff"
    assert safe("model [bold]<b>&amp;") == "model [bold]<b>&amp;"


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (None, "n/a"),
        (math.nan, "n/a"),
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.6768, "67.7 %"),
        (0.0065, "0.65 %"),
        (0.00072, "0.072 %"),
        (1e-7, "1.0e-05 %"),
        (0.9997, "99.97 %"),
        (0.99999, "99.999 %"),
        (1 - 1e-12, "99.9999999999 %"),
        (1 - 2**-53, "100 %"),
        (11.936, "1,194 %"),
        (1.5, "150.0 %"),
        (-0.25, "-25.0 %"),
    ],
)
def test_percent(fraction: float | None, text: str) -> None:
    assert percent(fraction) == text


@given(st.floats(1e-12, 1.0, exclude_max=True).filter(lambda x: x < 1.0 - 1e-8))
def test_percent_says_0_and_100_only_when_exact(fraction: float) -> None:
    shown = float(percent(fraction).removesuffix(" %"))
    assert 0.0 < shown < 100.0
    assert shown == pytest.approx(100 * fraction, rel=0.06) or abs(shown - 100 * fraction) <= 0.051


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (9999, "9,999"),
        (22_713_216, "22.7 M"),
        (999_600, "1 M"),
        (1_040_000_000_000, "1.04 T"),
        (65_536, "65.5 k"),
    ],
)
def test_quantity(count: int, text: str) -> None:
    assert quantity(count) == text


def test_sizes_and_times() -> None:
    assert size(2_147_483_648) == "2.15 GB"
    assert size(512) == "512 B"
    assert size(999_999) == "1 MB"
    assert binary_size(400 << 20) == "400 MiB"
    assert binary_size(1000) == "0.977 KiB"
    assert [duration(s) for s in (0.2, 59.4, 59.6, 125, 3780)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "2 min 05 s",
        "1 h 03 min",
    ]


def test_other_numbers() -> None:
    assert number(None) == "n/a"
    assert number(math.inf) == "n/a"
    assert number(12345) == "12,345"
    assert number(0.0123456) == "0.0123"
    assert plural(1, "tensor") == "1 tensor"
    assert plural(1200, "tensor") == "1,200 tensors"
    assert shape_text(()) == "scalar"
    assert shape_text((512, 64)) == "512x64"
