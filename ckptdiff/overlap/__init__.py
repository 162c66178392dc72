"""Count what the updates of several runs from one base have in common, beside what chance would give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptdiff.overlap.count import overlap
from ckptdiff.overlap.figures import Overlap, PairCounts

if TYPE_CHECKING:
    from ckptdiff.overlap.combine import Operation, combine_masks

__all__ = ["Operation", "Overlap", "PairCounts", "combine_masks", "overlap"]


def __getattr__(name: str) -> Any:
    if name in ("Operation", "combine_masks"):  # they write run files, which an overlap has no use for
        from ckptdiff.overlap import combine

        return getattr(combine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
