"""Read a tensor's name by the table of layouts: which parts of which module it holds."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ckptdiff.checkpoint.layout_table import LAYOUTS, RENAMES, Layout
from ckptdiff.checkpoint.matching import unwrapped
from ckptdiff.checkpoint.names import split_numbers

__all__ = ["BLOCK_OF_PART", "Names", "Reading", "Where"]

Where = tuple[str, str, tuple[str, ...]]
"""A module: its tower, its name without wrappers and with ``*`` for numbers, and these numbers."""

_KIND = re.compile(r"(?P<stem>.+?)(?:(?P<mark>[._])(?P<kind>weight(?:_scale(?:_inv)?)?|bias|scale_inv))?", re.DOTALL)
_KIND_OF = {None: "weight", "weight": "weight", "bias": "bias"}
_EXPERT = ("experts", "*")


def _forms() -> dict[str, Layout]:
    return {name: layout for layout in LAYOUTS for name in layout.names.split()}


def _blocks() -> dict[str, str]:
    """What a part belongs to: the same for parts that some layout stores together."""
    block = {part: part for layout in LAYOUTS for part in layout.parts.split()}
    for layout in LAYOUTS:
        joined = {block[part] for part in layout.parts.split()}
        block |= {part: min(joined) for part, old in block.items() if old in joined}
    return block


_FORMS = _forms()
BLOCK_OF_PART = _blocks()
"""By part, what it belongs to."""
_RENAMES = tuple((re.compile(pattern), become) for pattern, become in RENAMES)


@dataclass(frozen=True, slots=True)
class Reading:
    """A layout that fits a name.

    Attributes
    ----------
    layout : Layout
        The row of the table.
    spelling : str
        The name in that row.
    parts : tuple of str
        Its parts.
    block : str
        The same for all parts that go together.
    kind : str
        "weight", "bias" or "scale".
    inside : str
        The module's name, with ``*`` for numbers.
    expert : int or None
        Which of the name's numbers is that of an expert.
    """

    layout: Layout
    spelling: str
    parts: tuple[str, ...]
    block: str
    kind: str
    inside: str
    expert: int | None

    @property
    def flipped(self) -> bool:
        """Whether it is stored as [in, out], whatever shapes say."""
        return bool(self.layout.transposed) and self.kind != "bias"

    def opens(self, stacked: bool) -> bool:
        """Whether only shapes tell which way its last two axes go."""
        layout = self.layout
        if self.kind == "bias" or layout.ndim > 2 or layout.transposed:
            return False
        return stacked or layout.transposed is None


class Names:
    """Read many names; what names have in common but for their numbers is read once."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, str, Reading | None]] = {}

    def read(self, name: str) -> tuple[Where, Where, Reading | None, int | None]:
        """Read a name.

        Returns
        -------
        Where
            The name itself, in the words of the table: two names of one tensor give the same.
        Where
            The module that it belongs to; without a reading, the name again.
        Reading or None
            The layout that fits.
        int or None
            The expert's number.
        """
        (tower, plain, reading), numbers = self._skeleton(name)
        whole = (tower, plain, numbers)
        if reading is None:
            return whole, whole, None, None
        if reading.expert is None:
            return whole, (tower, reading.inside, numbers), reading, None
        others = numbers[: reading.expert] + numbers[reading.expert + 1 :]
        return whole, (tower, reading.inside, others), reading, int(numbers[reading.expert])

    def reading(self, name: str) -> Reading | None:
        """The layout that fits a name, if there is one."""
        return self._skeleton(name)[0][2]

    def _skeleton(self, name: str) -> tuple[tuple[str, str, Reading | None], tuple[str, ...]]:
        skeleton, numbers = split_numbers(name)
        known = self._known.get(skeleton)
        if known is None:
            known = self._known[skeleton] = _read(skeleton, len(numbers))
        return known, numbers


def _read(skeleton: str, numbers: int) -> tuple[str, str, Reading | None]:
    tower, plain = unwrapped(skeleton)
    for pattern, become in _RENAMES:
        plain = pattern.sub(become, plain)
    if plain.count("*") != numbers:
        return tower, plain, None  # a name that holds "*" itself, or whose wrapper is numbered
    match = _KIND.fullmatch(plain)
    if match is None:
        return tower, plain, None
    path = tuple(match["stem"].split("."))
    mark = match["mark"] == "_"
    for length in range(min(3, len(path)), 0, -1):
        ending = ".".join(path[-length:])
        for spelling in (ending + "_", ending) if mark else (ending,):
            layout = _FORMS.get(spelling)
            if layout is not None:
                return tower, plain, _reading(layout, spelling, path, _KIND_OF.get(match["kind"], "scale"))
    return tower, plain, None


def _reading(layout: Layout, spelling: str, path: tuple[str, ...], kind: str) -> Reading:
    parts = tuple(layout.parts.split())
    # What the row names besides the last word is the same on both sides: attn, mlp.
    inside, expert = path[:-1], None
    if inside[-2:] == _EXPERT:
        inside, expert = inside[:-1], inside[:-1].count("*")
    return Reading(layout, spelling, parts, BLOCK_OF_PART[parts[0]], kind, ".".join(inside), expert)
