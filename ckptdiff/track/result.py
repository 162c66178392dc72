"""Keep the growth of an update, by tensor and step: :class:`Track`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import locate_all
from ckptdiff.errors import OptionError
from ckptdiff.figures.members import LABEL_KEYS, members_of
from ckptdiff.track.geometry import GRAM_FIGURES, gram_matrix, gram_row, nullable, step_cosines
from ckptdiff.track.subspaces import LOCKING_FIGURES, Locking

COUNTS = {
    "support": "coordinates that differ from the base",
    "touched": "those of them that never did before",
    "returned": "those of them that did before, but not one step ago",
    "reverted": "coordinates that differed one step ago and are back at the base",
    "churned": "coordinates that differed one step ago, still do, and have another value now",
    "union": "coordinates that have differed at any step so far",
}
"""Counts of a step. Whatever moved since the step before is touched, returned, reverted or churned."""

TRACK_FIGURES = ("numel", *COUNTS, "support_fraction", "union_fraction", "rel_norm")
"""Keys of a row, before those that were asked for."""


@dataclass(frozen=True, eq=False, slots=True)
class Track:
    """The trajectory of an update.

    Attributes
    ----------
    base : str
        Path of the base.
    steps : tuple of str
        Paths of the later checkpoints, in order.
    compare : str
        "bf16" or "stored".
    names : tuple of str
        Tensors.
    shapes : tuple of tuple of int
    counts : mapping of str to int64 array, shape (steps, tensors)
        :data:`COUNTS`, but "returned" and "union", which follow from the others.
    base_norms : float64 array, shape (tensors,)
        Frobenius norms of W0.
    delta_norms : float64 array, shape (steps, tensors)
        Frobenius norms of W - W0.
    warnings : tuple of str
        What was left out.
    products : float64 array, shape (tensors, pairs), optional
        Inner products of the updates W - W0 of each two steps, the lower triangle of the Gram matrix row by row:
        (0, 0), (1, 0), (1, 1), (2, 0), ...
    locking : Locking, optional
        Overlaps of the leading singular subspaces of these updates.

    Examples
    --------
    >>> from ckptdiff.track import track
    >>> found = track("fixtures/llama/base", ["fixtures/llama/tuned"])
    >>> [label["module_type"] for label, rows in found.grouped("module")][:2]
    ['embed_tokens', 'norm']
    """

    base: str
    steps: tuple[str, ...]
    compare: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    counts: dict[str, NDArray[np.int64]]
    base_norms: NDArray[np.float64]
    delta_norms: NDArray[np.float64]
    warnings: tuple[str, ...] = ()
    products: NDArray[np.float64] | None = None
    locking: Locking | None = None

    @property
    def figures(self) -> tuple[str, ...]:
        """Keys of a row."""
        gram, locking = () if self.products is None else GRAM_FIGURES, () if self.locking is None else LOCKING_FIGURES
        return (*TRACK_FIGURES, *gram, *locking)

    def gram(self, tensors: Sequence[int] | None = None) -> NDArray[np.float64]:
        """Gram matrix of the updates of all steps, shape (steps, steps), of some tensors together, or of all.

        Raises OptionError if :attr:`products` were not measured.
        """
        if self.products is None:
            raise OptionError("the track has no products of its steps", hint="track(..., gram=True) sums them up")
        chosen = self.products if tensors is None else self.products[list(tensors)]
        return gram_matrix(chosen.sum(axis=0))

    def overall(self) -> list[dict[str, Any]]:
        """Figures of all tensors together, a row of :attr:`figures` for each step; None where undefined."""
        return self.of_group(range(len(self.names)))

    def grouped(self, by: str) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Label and rows, one per step, of each "tensor", "module", "layer" or "block"."""
        return [(label, self.of_group(rows)) for label, rows in self.members(by)]

    def members(self, by: str) -> list[tuple[dict[str, Any], list[int]]]:
        """Label of each "tensor", "module", "layer" or "block", and the places of its tensors in :attr:`names`."""
        if by == "tensor":
            return [({"name": name}, [row]) for row, name in enumerate(self.names)]
        places = list(locate_all(dict(zip(self.names, self.shapes, strict=True))).values())
        return [
            (dict(zip(LABEL_KEYS[by], label, strict=True)), rows)
            for label, rows in members_of(by, range(len(places)), places).items()
        ]

    def _repr_html_(self) -> str:
        """What notebooks show."""
        from ckptdiff.page.track_page import track_html

        return track_html(self)

    def as_json(self, *, tensors: bool = True) -> dict[str, Any]:
        """All of it as one object of plain JSON values (schema "ckptdiff.track/1"), or all but single tensors.

        Figures of each two steps are those of everything, of layers and of module types.
        """
        groups = {
            f"{by}s": [
                {**label, "steps": self.of_group(rows), **(self._matrices(rows) if by in ("module", "layer") else {})}
                for label, rows in self.members(by)
            ]
            for by in (*(["tensor"] if tensors else []), "module", "layer", "block")
        }
        return {
            "schema": "ckptdiff.track/1",
            "base": self.base,
            "steps": list(self.steps),
            "compare": self.compare,
            "global": self.overall(),
            **self._matrices(range(len(self.names))),
            **groups,
            "warnings": list(self.warnings),
        }

    def _matrices(self, rows: Sequence[int]) -> dict[str, Any]:
        found = {}
        if self.products is not None:
            gram = self.gram(rows)
            found = {"gram": nullable(gram), "step_cosines": nullable(step_cosines(gram))}
        if self.locking is not None:
            for key in ("left_overlap", "right_overlap"):
                found[f"{key}s"] = nullable(self.locking.matrix(key, rows, len(self.steps)))
        return found

    def of_group(self, tensors: Sequence[int]) -> list[dict[str, Any]]:
        """Figures of some tensors together, by their places in :attr:`names`: a row for each step."""
        return [row | self._directions(tensors, step) for step, row in enumerate(self.counts_of(tensors))]

    def last_of_group(self, tensors: Sequence[int]) -> dict[str, Any]:
        """The row of the last step alone."""
        return self.counts_of(tensors)[-1] | self._directions(tensors, len(self.steps) - 1)

    def _directions(self, tensors: Sequence[int], step: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.products is not None:
            path = slice(step + 1)
            found |= gram_row(self.gram(tensors)[path, path], math.hypot(*self.base_norms[list(tensors)]))
        return found if self.locking is None else found | self.locking.row(tensors, step)

    def counts_of(self, tensors: Sequence[int]) -> list[dict[str, Any]]:
        """:data:`TRACK_FIGURES` of some tensors together, a row for each step."""
        chosen = list(tensors)
        numel = sum(math.prod(self.shapes[row]) for row in chosen)
        base_norm = math.hypot(*self.base_norms[chosen])
        rows: list[dict[str, Any]] = []
        support = union = 0
        for step in range(len(self.steps)):
            count = {key: int(values[step, chosen].sum()) for key, values in self.counts.items()}
            union += count["touched"]
            returned = count["support"] - support - count["touched"] + count["reverted"]
            support = count["support"]
            delta_norm = math.hypot(*self.delta_norms[step, chosen])
            # A norm is infinite if its squares are beyond float64.
            defined = base_norm > 0 and math.isfinite(base_norm) and math.isfinite(delta_norm)
            known = {**count, "returned": returned, "union": union}
            rows.append(
                {
                    "numel": numel,
                    **{key: known[key] for key in COUNTS},
                    "support_fraction": support / numel if numel else None,
                    "union_fraction": union / numel if numel else None,
                    "rel_norm": delta_norm / base_norm if defined else None,
                }
            )
        return rows
