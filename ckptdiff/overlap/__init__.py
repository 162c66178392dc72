"""How much the updates of several runs from one base have in common, beside what chance would give."""

from ckptdiff.overlap.count import overlap
from ckptdiff.overlap.figures import Overlap, PairCounts

__all__ = ["Overlap", "PairCounts", "overlap"]
