"""Explain the titles of the columns that a table shows, and name those that had no room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckptdiff.report.screen import Column, Screen, folded, shown_columns

_WIDTH = 110
"""Characters of a line off-terminal, and at most."""


def legend_lines(meanings: Mapping[str, str], tables: Sequence[Sequence[Column]], screen: Screen) -> list[str]:
    """Lay out what stands below tables: an empty line and the sentences for the titles that need one, or nothing."""
    shown = {column.title for columns in tables for column in shown_columns(columns, screen)}
    filled = dict.fromkeys(column.title for columns in tables for column in columns[1:] if any(column.cells))
    # A title is not broken: no-break spaces are left alone.
    sentences = [
        meaning.replace(title, title.replace(" ", "\xa0")) for title, meaning in meanings.items() if title in shown
    ]
    hidden = [title for title in filled if title and title not in shown]
    if hidden:
        sentences.append(f"No room for: {', '.join(hidden)}; a pipe shows all.")
    lines = folded("   ".join(sentences), min(screen.width or _WIDTH, _WIDTH))
    return ["", *(screen.paint(line, "dim") for line in lines)] if lines else []
