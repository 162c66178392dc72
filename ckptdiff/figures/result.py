"""Hold a result in memory: the engine and ``RunFile.load`` make a :class:`Diff`, and reports take nothing else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.figures.catalogue import Figure
from ckptdiff.figures.coverage import EXCLUDED, SideCoverage
from ckptdiff.figures.evaluate import figures_of, median_2d, values_of
from ckptdiff.figures.grouping import Grouping
from ckptdiff.figures.members import LABEL_KEYS, GroupBy, members_of
from ckptdiff.figures.spectral import Spectra
from ckptdiff.figures.tensor_facts import (
    SIDES,
    KeptFacts,
    PieceFacts,
    RowCounts,
    Side,
    TensorFacts,
    UnmatchedTensor,
)
from ckptdiff.formats import FORMATS

__all__ = [
    "SIDES",
    "Diff",
    "KeptFacts",
    "PieceFacts",
    "RowCounts",
    "Side",
    "TensorFacts",
    "UnmatchedTensor",
]


@dataclass(frozen=True)
class Diff:
    """The result of comparing two checkpoints.

    Attributes
    ----------
    tensors : tuple of TensorFacts
        Compared tensors in plan order.
    columns : mapping of str to array, shape (len(tensors),)
        Measured per tensor; :data:`~ckptdiff.figures.catalogue.COLUMNS` describes each.
    base, tuned : mapping
        Provenance of each side: ``path``, ``tensors``, ``numel``, ``values``, ``bytes``, ``dtypes``, ``shards``;
        ``uncompared``: weights of its folder that were not read, and tensors that only ``config.json`` calls tied;
        ``tied``: values of tensors that are a compared one's under a second name; and ``left_out``: what else was not
        compared, by :func:`~ckptdiff.figures.coverage.by_pattern`. Older run files lack the last three.
    options : mapping
        The options of the run, as plain JSON values.
    compare : str
        "bf16" or "stored".
    mask_rule : str
        Such as "abs:1e-05", or "none".

    Examples
    --------
    >>> import ckptdiff
    >>> found = ckptdiff.diff("fixtures/llama/base", "fixtures/llama/tuned")
    >>> found.identical, found.counts["matched"]
    (False, 39)
    >>> found.overall["unchanged_abs"]["1e-05"] > found.overall["unchanged_bitwise"]
    True
    >>> [row["module_type"] for row in found.grouped("module")][:2]
    ['embed_tokens', 'norm']
    """

    tensors: tuple[TensorFacts, ...]
    columns: Mapping[str, NDArray[Any]]
    base: Mapping[str, Any]
    tuned: Mapping[str, Any]
    compare: str
    mask_rule: str
    options: Mapping[str, Any]
    ckptdiff_version: str
    only_in_base: tuple[str, ...] = ()
    only_in_tuned: tuple[str, ...] = ()
    aliased: tuple[tuple[str, str], ...] = ()
    """(name, name of the tensor it is tied to)."""
    mismatched: tuple[UnmatchedTensor, ...] = ()
    suggested_map: tuple[str, ...] = ()
    """Rules for ``--map``, after those of the run, that would pair more tensors."""
    warnings: tuple[str, ...] = ()
    run: Mapping[str, Any] = field(default_factory=dict)
    """How it ran: device, threads, io, started, seconds."""
    spectra: Spectra | None = None
    """Spectral figures, None if none were measured."""

    # What shows it, this room knows by name alone.

    def _repr_html_(self) -> str:
        """What notebooks show."""
        return str(import_module("ckptdiff.page").diff_html(self))

    @property
    def plot(self) -> Any:
        """Its pictures: a :class:`~ckptdiff.page.pictures.Pictures`."""
        return import_module("ckptdiff.page.pictures").Pictures(self)

    def to_pandas(self, by: GroupBy = "tensor") -> Any:
        """Figures as a pandas DataFrame, a row for each tensor or group.

        Parameters
        ----------
        by : {"tensor", "module", "layer", "layer,module", "block", "tower", "group"}

        Returns
        -------
        pandas.DataFrame
            Columns as in ``--format csv``: labels, counts, and figures under their flat keys, missing where undefined.

        Raises
        ------
        OptionError
            pandas is not installed.
        """
        return import_module("ckptdiff.report.frames").pandas_frame(self, by)

    def to_arrow(self, by: GroupBy = "tensor") -> Any:
        """Figures as a pyarrow Table, as ``--format parquet`` writes them: parameters and rows of :meth:`to_pandas`.

        Raises
        ------
        OptionError
            pyarrow is not installed.
        """
        return import_module("ckptdiff.report.frames").arrow_table(self, by)

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors were matched, and how many were not."""
        return {
            "matched": len(self.tensors),
            "same_bytes": sum(map(attrgetter("same_bytes"), self.tensors)),
            "unread": int(self._unread.sum()),
            "only_in_base": len(self.only_in_base),
            "only_in_tuned": len(self.only_in_tuned),
            "mismatched": len(self.mismatched),
            "aliased": len(self.aliased),
        }

    @cached_property
    def coverage(self) -> dict[Side, SideCoverage]:
        """How much of each side was compared."""
        found: dict[Side, SideCoverage] = {}
        # Tens of thousands of tensors have few shapes between them.
        counts = Counter(map(attrgetter("shape", "compared"), self.tensors))
        for at, (side, facts) in enumerate(zip(SIDES, (self.base, self.tuned), strict=True)):
            # Older run files do not tell which side stores an alias.
            tied = facts.get("tied", None if self.aliased else 0)
            compared = sum(
                count * (math.prod(shape) if both is None else both[at]) for (shape, both), count in counts.items()
            )
            whole = facts.get("values", facts.get("numel"))
            found[side] = SideCoverage(whole, None if tied is None else tied + compared)
        return found

    @property
    def identical(self) -> bool:
        """Whether no value differs, and every value of both sides is accounted for.

        That is: compared and equal, or that of a tensor which is equal to a compared one of its own side. What
        ``include`` and ``exclude`` leave out does not count.
        """
        left_out = self.only_in_base or self.only_in_tuned or self.mismatched or any(map(self.uncompared, SIDES))
        # Rows and parts; older run files compared tensors of equal shape alone, and do not tell.
        groups = [group for side in (self.base, self.tuned) for group in side.get("left_out", ())]
        left_out = left_out or any(group["why"] != EXCLUDED for group in groups)
        return not (left_out or self.differing.any())

    @property
    def differing(self) -> NDArray[np.bool_]:
        """Which tensors hold a value that differs, as stored or after the cast, shape (len(tensors),)."""
        columns, numel = self.columns, self.columns["numel"]
        stored = columns["wide"].astype(bool) & (columns["unchanged_stored"] != numel)
        found: NDArray[np.bool_] = stored | (columns["unchanged_bitwise"] != numel)
        return found

    def uncompared(self, side: Side) -> tuple[str, ...]:
        """Weights of a side that are neither compared nor listed as unmatched: files, and tensors taken as tied."""
        facts = self.base if side == "base" else self.tuned
        # Older run files lack it, and call tied what only had the names and the shapes for it.
        return tuple(facts.get("uncompared", (name for name, _ in self.aliased)))

    @cached_property
    def overall(self) -> dict[str, Any]:
        """Figures over all floating tensors, weighted by size."""
        rows = np.flatnonzero(self._valued)
        return figures_of(self._grouping(rows, np.zeros(len(rows), np.intp), 1))[0]

    @cached_property
    def median_2d(self) -> dict[str, Any]:
        """Unweighted medians over native 2-D tensors with a nonzero delta."""
        dimensions = np.array(list(map(len, map(attrgetter("shape"), self.tensors))), np.int64)
        matrices = (dimensions == 2) & self._valued
        figures = median_2d(self._grouping(), matrices)
        return figures | self._spectral(np.arange(len(self.tensors)))

    @cached_property
    def per_tensor(self) -> list[dict[str, Any]]:
        """Figures of each tensor, in the order of :attr:`tensors`."""
        figures = figures_of(self._grouping())
        if self.spectra is None:
            return figures
        return [{**row, "spectral": self.spectra.tensor(index)} for index, row in enumerate(figures)]

    def of_tensors(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Figures of some tensors, by their place in :attr:`tensors`: cheaper than :attr:`per_tensor` if few."""
        figures = figures_of(self._grouping(list(rows), np.arange(len(rows)), len(rows)))
        if self.spectra is None:
            return figures
        return [{**found, "spectral": self.spectra.tensor(row)} for row, found in zip(rows, figures, strict=True)]

    def values(self, figure: Figure, parameter: float | None) -> NDArray[np.float64]:
        """One figure of every tensor, NaN where undefined, shape (len(tensors),).

        Parameters
        ----------
        figure : Figure
            A row of :data:`~ckptdiff.figures.catalogue.FIGURES`.
        parameter : float or None
            Which of its parameters; None for a figure without any.
        """
        return values_of(self._grouping(), figure, parameter)

    def grouped(self, by: GroupBy) -> list[dict[str, Any]]:
        """Figures by layer, module type, both, block, tower or user group.

        Parameters
        ----------
        by : {"module", "layer", "layer,module", "block", "tower", "group"}

        Returns
        -------
        list of dict
            The label ("module_type", "layer" with its "tower", "block", "tower" or "group"), "tensors" (how
            many), "numel", then the figures. Groups come in order of first appearance, layers in order of their
            number; integer and opaque tensors are left out, and of layers what is in none.
        """
        if by == "tensor":
            raise ValueError("per_tensor holds the figures of single tensors")
        members = members_of(by, np.flatnonzero(self._valued).tolist(), self.tensors)
        heads = (dict(zip(LABEL_KEYS[by], label, strict=True)) for label in members)
        return [
            {**head, **figures} for head, figures in zip(heads, self.of_groups(list(members.values())), strict=True)
        ]

    def of_groups(self, members: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """Figures of groups of tensors, by their places in :attr:`tensors`: "tensors", "numel", then the figures."""
        rows = np.array([row for found in members for row in found], np.intp)
        ids = np.repeat(np.arange(len(members)), [len(found) for found in members])
        groups = self._grouping(rows, ids, len(members))
        numel = groups.total("numel").tolist()
        return [
            {"tensors": len(found), "numel": int(count), **figures, **self._spectral(found)}
            for found, count, figures in zip(members, numel, figures_of(groups), strict=True)
        ]

    def _spectral(self, rows: Sequence[int] | NDArray[np.intp]) -> dict[str, Any]:
        """Medians over the native matrices with a nonzero delta among some tensors, if there are spectra."""
        if self.spectra is None:
            return {}
        moved, experts = self.columns["delta_norm"] > 0, self.spectra.experts
        native = [row for row in rows if moved[row] and (len(self.tensors[row].shape) == 2 or row in experts)]
        return {"spectral": self.spectra.median(native)}

    def _grouping(
        self,
        rows: Sequence[int] | NDArray[np.intp] | None = None,
        labels: NDArray[np.intp] | None = None,
        size: int = 0,
    ) -> Grouping:
        """Some tensors in groups, or all of them as a group each."""
        columns: Mapping[str, NDArray[Any]] = {
            **self.columns,
            "value_bytes": self._value_bytes,
            "unread": self._unread,
        }
        every = np.arange(len(self.tensors))
        if rows is None or labels is None:
            return Grouping(columns, every, len(every), self._delta_energy)
        if not np.array_equal(rows, every):
            columns = {name: values[rows] for name, values in columns.items()}
        return Grouping(columns, labels, size, self._delta_energy)

    @cached_property
    def _unread(self) -> NDArray[np.bool_]:
        return np.array(list(map(attrgetter("unread"), self.tensors)), bool)

    @cached_property
    def _value_bytes(self) -> NDArray[np.float64]:
        """Bytes of a stored value of the tuned side; NaN unless it is a plain floating one."""
        dtypes = list(map(attrgetter("dtype_tuned"), self.tensors))
        formats = {dtype: FORMATS.get(dtype.lower()) for dtype in set(dtypes)}
        sizes = {dtype: math.nan if form is None else form.bits // 8 for dtype, form in formats.items()}
        found = np.array([sizes[dtype] for dtype in dtypes], np.float64)
        found[[facts.kept is not None for facts in self.tensors]] = math.nan
        return found

    @cached_property
    def _valued(self) -> NDArray[np.bool_]:
        valued: NDArray[np.bool_] = self.columns["valued"] > 0
        return valued

    @cached_property
    def _delta_energy(self) -> float:
        return float(np.nansum(np.square(self.columns["delta_norm"].astype(np.float64))))
