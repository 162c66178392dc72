"""The table fits its terminal, and loses nothing off-terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.color import ColorSystem
from safetensors.numpy import save_file

import ckptdiff
from ckptdiff.figures.members import GROUPINGS
from ckptdiff.figures.result import Diff
from ckptdiff.report.as_table import table, write
from ckptdiff.report.rows import View
from ckptdiff.report.screen import Column, Screen, bar, folded, screen_of, table_lines

MakeDiff = Callable[..., Diff]
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Pipe(io.StringIO):
    encoding = "utf-8"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def printed(diff: Diff, stream: io.StringIO, view: View | None = None) -> str:
    write(diff, stream, view or View())
    return stream.getvalue()


def test_a_pipe_gets_no_escapes_and_every_column(diff: Diff, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = printed(diff, Pipe(), View("tensor"))
    assert "\x1b" not in text
    for title in ("shape", "stored", "values", "unchanged", "|d|<=1e-5", "update", "share", "low 10 %", "max |d|"):
        assert title in text
    for facts in diff.tensors:
        assert facts.name in text


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("by", [None, *GROUPINGS])
def test_a_terminal_is_never_overrun(make_diff: MakeDiff, width: int, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = ANSI.sub("", printed(make_diff(3), Terminal(), View(by, run_file="run.h5")))
    assert max(map(len, text.splitlines())) <= width
    assert "unchanged" in text


def test_a_terminal_has_colors(diff: Diff) -> None:
    assert "\x1b[" in printed(diff, Terminal())


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colors_can_be_switched_off(diff: Diff, name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert "\x1b" not in printed(diff, Terminal())


def test_force_color_colors_a_pipe_but_keeps_it_wide(diff: Diff, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = printed(diff, Pipe(), View("tensor"))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    colored = printed(diff, Pipe(), View("tensor"))
    assert "\x1b[" in colored
    assert [line.rstrip() for line in ANSI.sub("", colored).splitlines()] == plain.splitlines()
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed(diff, Pipe(), View("tensor")) == plain


def test_the_overview_has_its_tables(diff: Diff) -> None:
    text = printed(diff, Pipe())
    assert [line.split("  ")[0] for line in text.splitlines() if "unchanged  " in line and "share" in line] == [
        "block",
        "module type",
        "layer",
        "top 5 movers",
    ]


def test_movers_are_the_largest_shares(diff: Diff) -> None:
    names = [facts.name for facts in diff.tensors]
    energy = dict(zip(names, (diff.columns["delta_norm"] ** 2).tolist(), strict=True))
    listed = printed(diff, Pipe(), View(top=2)).split("top 2 movers")[1].splitlines()[1:3]
    assert [line.split()[0] for line in listed] == sorted(names, key=lambda name: -energy[name])[:2]


def test_towers_and_groups_show_where_there_are_some(troubled_diff: Diff, make_diff: MakeDiff, make_facts) -> None:
    text = printed(troubled_diff, Pipe())
    assert "\ntower " in text and "vision 0" in text
    facts = make_facts("model.layers.0.mlp.up_proj.weight", (8, 8), groups=("mine",))
    assert "\ngroup " in printed(make_diff(tensors=[(facts, 0.5)]), Pipe())


def test_names_cannot_act(troubled_diff: Diff) -> None:
    text = printed(troubled_diff, Pipe(), View("tensor"))
    assert "\x1b" not in text and "\u202e" not in text
    assert "evil\\x1b[31m\\x0a\\u202ename[red]" in text


def test_undefined_cells_and_units(troubled_diff: Diff) -> None:
    row = next(line for line in printed(troubled_diff, Pipe(), View("tensor")).splitlines() if line.startswith("empty"))
    assert "n/a" in row
    row = next(line for line in printed(troubled_diff, Pipe(), View("tensor")).splitlines() if line.startswith("posit"))
    assert "50.0 %" in row


def test_an_empty_table_says_so(diff: Diff) -> None:
    assert "no group to show" in printed(diff, Pipe(), View("group"))


def test_ascii_streams_get_ascii_bars(diff: Diff) -> None:
    class Latin(Pipe):
        encoding = "latin-1"

    text = printed(diff, Latin())
    assert text.isascii() and "####" in text


@pytest.mark.parametrize(
    ("share", "drawn"), [(None, ""), (0.0, ""), (1.0, "████"), (0.5, "██"), (1e-6, "▏"), (0.53, "██▏")]
)
def test_bars(share: float | None, drawn: str) -> None:
    assert bar(share, 4, Screen()) == drawn


def test_columns_go_by_rank_and_names_fold() -> None:
    columns = [
        Column("name", ["a" * 50], left=True),
        Column("x", ["1" * 10]),
        Column("y", ["2" * 10], rank=1),
        Column("z", ["3" * 10], rank=2),
    ]
    assert table_lines(columns, Screen(width=100))[0].split() == ["name", "x", "y", "z"]
    assert table_lines(columns, Screen(width=75))[0].split() == ["name", "x", "y"]
    folded = table_lines(columns, Screen(width=40))
    assert folded[0].split() == ["name", "x"]
    assert max(map(len, folded)) <= 40
    assert "".join(line.split()[0] for line in folded[1:]) == "a" * 50


def test_a_column_of_nothing_is_left_out_but_never_the_first() -> None:
    columns = [Column("name", [""], left=True), Column("x", [""]), Column("y", ["1"])]
    assert table_lines(columns, Screen())[0].split() == ["name", "y"]


def test_the_empty_name_can_be_seen(make_diff: MakeDiff, make_facts) -> None:
    assert '\n""  ' in printed(make_diff(tensors=[(make_facts("", (4,)), 0.5)]), Pipe(), View("tensor"))


def test_screens() -> None:
    assert screen_of(Pipe()) == Screen(None, None, True)
    assert screen_of(Terminal()).colors is ColorSystem.EIGHT_BIT


def test_thirty_thousand_tensors_print_in_reasonable_time(make_diff: MakeDiff) -> None:
    lines = table(make_diff(250), View("tensor"), Screen())
    assert len(lines) > 250 * 8


def test_the_legend_tells_of_what_is_shown(diff: Diff, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "rms: that of W0" in printed(diff, Pipe()) and "No room for" not in printed(diff, Pipe())
    monkeypatch.setenv("COLUMNS", "80")
    text = " ".join(ANSI.sub("", printed(diff, Terminal(), View("block"))).split())
    assert "noise: unchanged, if" in text and "update: norm of d" in text and "rms: that of W0" not in text
    legend = text.split("update: norm of d")[1]
    assert "No room for: tensors, |d|<=1e-3 rms" in legend and "max |d|" in legend and "unchanged" not in legend


def test_movers_are_tensors_that_moved(diff: Diff) -> None:
    norms = np.zeros_like(diff.columns["delta_norm"])
    still = replace(diff, columns={**diff.columns, "delta_norm": norms})
    assert "movers" not in printed(still, Pipe())
    one = norms.copy()
    one[3] = 0.5
    text = printed(replace(diff, columns={**diff.columns, "delta_norm": one}), Pipe())
    assert text.split("top 1 movers")[1].splitlines()[1].split()[0] == diff.tensors[3].name


@pytest.mark.parametrize("width", [80, 100, 130])
def test_spectra_do_not_overrun_a_terminal(tmp_path: Path, width: int) -> None:
    rng = np.random.default_rng(0)
    name = "model.layers.0.mlp.up_proj.weight"
    base = rng.standard_normal((40, 30)).astype(np.float32)
    save_file({name: base}, tmp_path / "base.safetensors")
    save_file({name: base * (1 + 1e-2 * rng.standard_normal(base.shape))}, tmp_path / "tuned.safetensors")
    diff = ckptdiff.diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", mask="none", spectra="exact")
    lines = table(diff, View("tensor"), Screen(width=width))[2:]  # after the names of the files
    assert max(map(len, lines)) <= width
    assert any(line.startswith("spectra ") and "princ. 10 %" in line for line in lines)
    wide = table(diff, View("tensor"), Screen())
    assert "rank 1e-5: part of the singular values" in " ".join(wide) and "No room for" not in " ".join(wide)


def test_folded_lines_keep_percent_signs() -> None:
    assert folded("it holds 12.5 % of all", 15, "  ") == ["it holds 12.5 %", "  of all"]
    assert folded("it holds 12.5 % of all", 14, "  ") == ["it holds", "  12.5 % of", "  all"]
