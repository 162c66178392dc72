"""Make the figures of an overlap: shares, and what three kinds of chance would give (S1, S2, S3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.figures.members import LABEL_KEYS, members_of
from ckptdiff.figures.result import TensorFacts
from ckptdiff.report.rows import LIST_KEYS

_BASELINES = ("independent", "stratified", "conditional")
OVERLAP_FIGURES = tuple(
    f"{figure}{suffix}"
    for figure in ("o1", "o2", "jaccard", "zero_jaccard")
    for suffix in ("", *(f"_{b}" for b in _BASELINES))
)
"""Every figure, each followed by its three baselines; ``zero_jaccard`` is that of what the masks leave out."""
COSINE_FIGURES = ("cosine", "cosine_null_sd")
"""The cosine between two updates, and its standard deviation, around 0, if the sign of each change were tossed."""


@dataclass(frozen=True, eq=False, slots=True)
class PairCounts:
    """Counts of two runs, per tensor.

    Attributes
    ----------
    first, second : int
        Which runs.
    ones, twos, both : int64 array, shape (tensors,)
        Coordinates in the first mask, in the second, in both.
    expected : float64 array, shape (tensors,)
        Coordinates that would be in both if the masks met by chance among weights of the same magnitude; NaN unknown.
    """

    first: int
    second: int
    ones: NDArray[np.int64]
    twos: NDArray[np.int64]
    both: NDArray[np.int64]
    expected: NDArray[np.float64]


@dataclass(frozen=True, eq=False, slots=True)
class Overlap:
    """The overlap of each two of several runs.

    Attributes
    ----------
    runs : tuple of str
        Paths of the run files.
    rules : tuple of str
        Their mask rules.
    tensors : tuple of TensorFacts
        What they have in common.
    pairs : tuple of PairCounts
        In the order (0, 1), (0, 2), ..., (1, 2), ...
    warnings : tuple of str
    products : float64 array, shape (tensors, 2, pairs), optional
        Sums of the products of each two updates, and of the squares of these products, of runs (0, 0), (1, 0), (1, 1),
        (2, 0), ...; NaN for a tensor that was not read.

    Examples
    --------
    >>> from ckptdiff.overlap import overlap
    >>> found = overlap(["run.h5", "run.h5"])
    >>> [(row["block"], row["o1"]) for row in found.grouped(found.pairs[0], "block")][:2]
    [('embedding', 1.0), ('norm', None)]
    """

    runs: tuple[str, ...]
    rules: tuple[str, ...]
    tensors: tuple[TensorFacts, ...]
    pairs: tuple[PairCounts, ...]
    warnings: tuple[str, ...] = ()
    products: NDArray[np.float64] | None = None

    def overall(self, pair: PairCounts) -> dict[str, Any]:
        """Figures of a pair over all floating tensors, None where a mask is empty.

        Counts, then `OVERLAP_FIGURES`, then `COSINE_FIGURES` if there are :attr:`products`.
        """
        return self.of_group(pair, self._valued())

    def grouped(self, pair: PairCounts, by: str) -> list[dict[str, Any]]:
        """Figures of a pair by any of :data:`~ckptdiff.figures.members.GROUPINGS`, each row with its label.

        Groups are of floating tensors, in order of first appearance, layers in order of their number. "group" are the
        user's own, as the first run has them; a tensor may be in several.
        """
        if by == "tensor":
            return [{"name": facts.name, **self.of_group(pair, [row])} for row, facts in enumerate(self.tensors)]
        members = members_of(by, self._valued(), self.tensors)
        return [
            {**dict(zip(LABEL_KEYS[by], label, strict=True)), "tensors": len(rows), **self.of_group(pair, rows)}
            for label, rows in members.items()
        ]

    def _repr_html_(self) -> str:
        """What notebooks show."""
        from ckptdiff.page.overlap_table import overlap_section

        return overlap_section(self)

    def as_json(self) -> dict[str, Any]:
        """All of it as one object of plain JSON values (schema "ckptdiff.overlap/1")."""
        pairs = [
            {
                "first": pair.first,
                "second": pair.second,
                "global": self.overall(pair),
                **{key: rows for by, key in LIST_KEYS.items() if (rows := self.grouped(pair, by)) or by != "group"},
            }
            for pair in self.pairs
        ]
        runs = [{"path": path, "mask_rule": rule} for path, rule in zip(self.runs, self.rules, strict=True)]
        return {"schema": "ckptdiff.overlap/1", "runs": runs, "pairs": pairs, "warnings": list(self.warnings)}

    def _valued(self) -> list[int]:
        return [row for row, facts in enumerate(self.tensors) if facts.compare != "bitwise"]

    def of_group(self, pair: PairCounts, rows: Sequence[int]) -> dict[str, Any]:
        """Figures of a pair over some tensors, by their places in :attr:`tensors`."""
        numels = [self.tensors[row].numel for row in rows]
        ones, twos = pair.ones[rows].tolist(), pair.twos[rows].tolist()
        total, one, two, both = sum(numels), sum(ones), sum(twos), int(pair.both[rows].sum())
        stratified = math.fsum(a * b / n for a, b, n in zip(ones, twos, numels, strict=True) if n)
        # A tensor that one of the masks leaves out has nothing in common with it, whatever the magnitudes.
        conditional = math.fsum(
            0.0 if not (a and b) else expected
            for a, b, expected in zip(ones, twos, pair.expected[rows].tolist(), strict=True)
        )
        chances = (one * two / total if total else math.nan, stratified, conditional)
        counts = {"numel": total, "masked_1": one, "masked_2": two, "masked_both": both}
        # What both leave out is all that neither holds.
        outside = [total - one - two + shared for shared in (both, *chances)]
        return {
            **counts,
            **_figures({"o1": one, "o2": two}, "jaccard", one, two, (both, *chances)),
            **_figures({}, "zero_jaccard", total - one, total - two, outside),
            **self._cosine(pair, rows),
        }

    def _cosine(self, pair: PairCounts, rows: Sequence[int]) -> dict[str, float | None]:
        """<a, b> / (|a| |b|) and sqrt(sum a_k^2 b_k^2) / (|a| |b|), the spread of the former under random signs."""
        if self.products is None:
            return {}
        own, other = (run * (run + 1) // 2 + run for run in (pair.first, pair.second))
        both = pair.second * (pair.second + 1) // 2 + pair.first
        known = self.products[rows][~np.isnan(self.products[rows, 0, own])]
        sums, squares = known[:, 0].sum(axis=0), known[:, 1].sum(axis=0)
        lengths = math.sqrt(sums[own]) * math.sqrt(sums[other])
        defined = 0 < lengths < math.inf
        cosine = min(max(float(sums[both]) / lengths, -1.0), 1.0) if defined else None
        return {"cosine": cosine, "cosine_null_sd": math.sqrt(squares[both]) / lengths if defined else None}


def _figures(
    shares: Mapping[str, int], jaccard: str, one: int, two: int, common: Sequence[float]
) -> dict[str, float | None]:
    """Shares and Jaccard of two sets, of what they have in common and of what each chance would give.

    Null where one of the sets is empty.
    """
    row: dict[str, float | None] = {}
    for figure in (*shares, jaccard):
        for suffix, shared in zip(("", *(f"_{b}" for b in _BASELINES)), common, strict=True):
            defined = one > 0 and two > 0 and not math.isnan(shared)
            row[f"{figure}{suffix}"] = shared / shares.get(figure, one + two - shared) if defined else None
    return row
