"""Find out what a stream can show (its width, colours, bars), and lay out text for it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import TextIO

from rich.cells import cell_len
from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

_BLOCKS = " ▏▎▍▌▋▊▉█"
_GAP = "  "
_NARROWEST = 20
_LEGEND_WIDTH = 110
"""Characters of a line off-terminal, and at most."""


@dataclass(frozen=True, slots=True)
class Screen:
    """A stream's abilities."""

    width: int | None = None
    """Columns of the terminal; None off-terminal, where nothing is wrapped, folded or left out."""
    colors: ColorSystem | None = None
    """None prints plain text without a single escape sequence."""
    blocks: bool = True
    """Whether the encoding has block characters."""

    def paint(self, text: str, style: str) -> str:
        """Text in a style, if the stream shows colours."""
        return (
            text
            if self.colors is None or not (text and style)
            else Style.parse(style).render(text, color_system=self.colors)
        )


def screen_of(stream: TextIO) -> Screen:
    """Ask a stream what it can show.

    NO_COLOR and TERM=dumb switch colours off, FORCE_COLOR switches them on for a pipe; a pipe stays as wide as it
    needs to be.
    """
    terminal = stream.isatty()
    console = Console(file=stream)
    colored = (terminal or _asked("FORCE_COLOR")) and not _asked("NO_COLOR") and not console.is_dumb_terminal
    name = console.color_system or "standard"
    try:
        _BLOCKS.encode(stream.encoding or "ascii")
        blocks = True
    except (UnicodeEncodeError, LookupError):
        blocks = False
    return Screen(
        console.width if terminal else None,
        {"truecolor": ColorSystem.TRUECOLOR, "256": ColorSystem.EIGHT_BIT}.get(name, ColorSystem.STANDARD)
        if colored
        else None,
        blocks,
    )


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


def folded(text: str, width: int, indent: str = "") -> list[str]:
    """Text in lines of at most `width` cells; a number stays with its percent sign."""
    lines = wrap(text.replace(" %", "\xa0%"), width, subsequent_indent=indent, break_long_words=False)
    return [line.replace("\xa0", " ") for line in lines]


def bar(share: float | None, width: int, screen: Screen) -> str:
    """A bar of `share` (0..1) of `width` characters, to an eighth of a character."""
    if share is None or not share > 0.0:
        return ""
    if not screen.blocks:
        return "#" * max(1, round(share * width))
    eighths = max(1, round(min(share, 1.0) * width * 8))
    return _BLOCKS[8] * (eighths // 8) + _BLOCKS[eighths % 8].strip()


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table."""

    title: str
    cells: Sequence[str]
    """One per row, safe to print."""
    left: bool = False
    """Flush left (labels, bars) rather than right (numbers)."""
    style: str = ""
    """Style of the cells."""
    rank: int = 0
    """On a terminal that is too narrow, columns of the highest rank are left out first; rank 0 stays."""

    @property
    def width(self) -> int:
        """Cells that the title and every cell need."""
        return max(map(cell_len, (self.title, *self.cells)))


def table_lines(columns: Sequence[Column], screen: Screen) -> list[str]:
    """Lay columns out in lines.

    Columns that do not fit a terminal are left out by rank; if that does not do, the first column is folded over
    several lines. Off-terminal every column is printed as wide as it is.
    """
    kept = shown_columns(columns, screen)
    widths = [column.width for column in kept]
    if screen.width is not None:
        widths[0] = max(min(widths[0], _NARROWEST), widths[0] - max(0, _total(kept) - screen.width))
    lines = [_line([column.title for column in kept], kept, widths, screen, "bold")]
    for head, *cells in zip(*(column.cells for column in kept), strict=True):
        first, *more = _fold(head, widths[0])
        lines.append(_line([first, *cells], kept, widths, screen))
        lines += [screen.paint(part, kept[0].style) for part in more]
    return lines


def shown_columns(columns: Sequence[Column], screen: Screen) -> list[Column]:
    """The columns of a table that hold anything and have room."""
    kept = [columns[0], *(column for column in columns[1:] if any(column.cells))]
    while screen.width is not None and _total(kept) > screen.width and (worst := max(c.rank for c in kept)):
        kept = [column for column in kept if column.rank < worst]
    return kept


def _total(columns: Sequence[Column]) -> int:
    return sum(column.width for column in columns) + len(_GAP) * (len(columns) - 1)


def _line(
    cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int], screen: Screen, style: str = ""
) -> str:
    parts = []
    for text, column, width in zip(cells, columns, widths, strict=True):
        space = " " * (width - cell_len(text))
        painted = screen.paint(text, style or column.style)
        parts.append(painted + space if column.left else space + painted)
    return _GAP.join(parts).rstrip()


def _fold(text: str, width: int) -> list[str]:
    parts, part, used = [], "", 0
    for char in text if cell_len(text) > width else ():
        if used + cell_len(char) > width:
            parts.append(part)
            part, used = "  ", 2
        part += char
        used += cell_len(char)
    return [*parts, part] if part else [text]


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
    lines = folded("   ".join(sentences), min(screen.width or _LEGEND_WIDTH, _LEGEND_WIDTH))
    return ["", *(screen.paint(line, "dim") for line in lines)] if lines else []
