"""Name the members of a grouping for a screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptdiff.figures.members import LABEL_KEYS, GroupBy
from ckptdiff.report.text import safe

__all__ = ["labels"]


def labels(members: Sequence[Mapping[str, Any]], by: GroupBy) -> list[str]:
    """What the members of a grouping are called on the screen."""
    if by == "layer":
        towers = {row["tower"] for row in members}
        return [f"{row['tower']} {row['layer']}" if len(towers) > 1 else str(row["layer"]) for row in members]
    (key,) = LABEL_KEYS[by]
    return [safe(str(row[key])) or '""' for row in members]
