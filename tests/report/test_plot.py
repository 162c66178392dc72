"""The plot puts every value at its height."""

from __future__ import annotations

from ckptdiff.report.plot import plot_lines
from ckptdiff.report.screen import Screen


def test_values_stand_at_their_heights() -> None:
    lines = plot_lines({"grows": [0.0, 0.1, 0.2], "shrinks": [0.2, 0.1, 0.0]}, Screen())
    rows = [line.partition("│ ")[2] for line in lines[:-1]]
    columns = {
        mark: {(row.index(mark, at), y) for y, row in enumerate(rows) for at in range(len(row)) if row[at] == mark}
        for mark in "●○"
    }
    grows = sorted(columns["●"])
    assert [x for x, _ in grows] == [0, 32, 63] or [x for x, _ in grows] == [0, 31, 63]
    assert [y for _, y in grows] == [9, 4, 0]
    assert {y for _, y in columns["○"]} == {0, 9}  # the middle one lies behind
    assert lines[0].startswith("20.0 %")
    assert lines[9].lstrip().startswith("0 %")
    assert "● grows   ○ shrinks" in lines[-1]


def test_a_plain_terminal_gets_plain_marks_and_its_width() -> None:
    lines = plot_lines({"a": [0.5, 1.0]}, Screen(width=30, blocks=False))
    assert all(len(line) <= 30 for line in lines)
    assert all(line.isascii() for line in lines)


def test_nothing_is_drawn_of_zeros() -> None:
    assert plot_lines({"a": [0.0, 0.0]}, Screen()) == []
