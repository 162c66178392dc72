"""Tell how much of each side was compared, and gather what was left out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

EXCLUDED = "left out by --include and --exclude"
"""Why values that the user did not ask for are not compared."""
PARTLY = "rows, or a part, that are only in {side}"
"""Why values of a tensor that is compared otherwise are not."""

_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")


@dataclass(frozen=True, slots=True)
class SideCoverage:
    """How much of one side was compared."""

    values: int | None
    """All its values, those of integer tensors and those that ``include`` and ``exclude`` leave out among them."""
    compared: int | None
    """Those that were compared, or are a compared tensor's under a second name. None if a run file does not tell."""

    @property
    def share(self) -> float | None:
        """Compared values / all values."""
        return self.compared / self.values if self.values and self.compared is not None else None

    def as_json(self) -> dict[str, Any]:
        """As the output contract writes it."""
        return {"values": self.values, "compared": self.compared, "share": self.share}


def by_pattern(tensors: Iterable[tuple[str, int | None, str]]) -> list[dict[str, Any]]:
    """Gather tensors whose names differ in numbers alone, such as the experts of all layers.

    Takes the name of each, its number of values, and why it was left out; gives those with most values first. In a
    pattern ``*`` stands for a number between dots; one tensor alone keeps its name.

    Examples
    --------
    >>> by_pattern([("h.0.w", 4, "only in base"), ("h.1.w", 4, "only in base")])
    [{'pattern': 'h.*.w', 'why': 'only in base', 'tensors': 2, 'values': 8}]
    """
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for name, values, why in tensors:
        found = groups.setdefault(
            (_NUMBER.sub("*", name), why), {"pattern": name, "why": why, "tensors": 0, "values": 0}
        )
        found["tensors"] += 1
        found["values"] = None if values is None else found["values"] + values
        if found["tensors"] > 1:
            found["pattern"] = _NUMBER.sub("*", name)
    return sorted(groups.values(), key=lambda found: -(found["values"] or 0))
