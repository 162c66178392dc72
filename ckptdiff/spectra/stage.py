"""The spectral stage: every matrix of a plan, one after the other, after the coordinate pass.

BLAS uses the cores of the machine, so that matrices need no threads of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.backends.formats import FORMATS, compare_format
from ckptdiff.checkpoint import Kind, TensorPair
from ckptdiff.linalg.blas_threads import blas_threads
from ckptdiff.linalg.passes import PanelSource, run_together
from ckptdiff.linalg.survey import Survey, survey
from ckptdiff.memory import resident
from ckptdiff.metrics.catalogue import RHO, flat_key
from ckptdiff.metrics.spectral import SPECTRAL_KEYS, Spectra
from ckptdiff.options import Options, SpectraOptions, default_threads
from ckptdiff.result import Diff
from ckptdiff.spectra.matrices import MatrixView, matrices_of
from ckptdiff.spectra.measure import MatrixSpectra, measure_exact, measure_randomized
from ckptdiff.spectra.memory import Room, cache_bytes, exact_bytes, randomized_bytes, room_of
from ckptdiff.spectra.source import StoredPanels
from ckptdiff.stream.reader import OpenShards

__all__ = ["SpectraTable", "TensorSpectra", "measure_spectra"]

_SMALL = 1 << 19
"""Entries of a matrix that one thread measures in no more time than it takes several to agree."""
_SAFE = (1e-12, 1e12)
"""Norms whose squares and fourth powers float32 can add up."""


@dataclass(frozen=True, slots=True)
class TensorSpectra:
    """The spectra of one tensor.

    Attributes
    ----------
    index : int
        In plan order.
    matrices : tuple of MatrixSpectra
        One for each matrix; empty for a vector.
    """

    index: int
    matrices: tuple[MatrixSpectra, ...]

    @property
    def method(self) -> str:
        """How it was measured: "randomized", "exact", or "" if no matrix was; the lesser where they differ."""
        methods = {matrix.method for matrix in self.matrices} - {""}
        return max(methods, default="")

    @property
    def lists(self) -> dict[str, NDArray[np.float64]]:
        """Singular values and angles by name, shape (n,), or (matrices, n) if the tensor has several matrices."""
        names = dict.fromkeys(name for matrix in self.matrices for name in matrix.values)
        return {name: self._stacked(name) if len(self.matrices) > 1 else self._stacked(name)[0] for name in names}

    def _stacked(self, name: str) -> NDArray[np.float64]:
        """One list of values of every matrix, NaN where unknown, shape (matrices, length)."""
        rows = [matrix.values.get(name, np.empty(0)) for matrix in self.matrices]
        found = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
        for row, values in zip(found, rows, strict=True):
            row[: len(values)] = values
        return found


def measure_spectra(
    pairs: Sequence[TensorPair], diff: Diff, shards: OpenShards, options: Options
) -> Iterator[TensorSpectra]:
    """Yield the spectra of every tensor pair, in order.

    Parameters
    ----------
    pairs : sequence of TensorPair
    diff : Diff
        What the coordinate pass found, with a row for each pair: equal pairs are not read again, and the rounding null
        applies where it applied there.
    shards : OpenShards
    options : Options
        With spectra.
    """
    unchanged = diff.columns["numel"] == diff.columns["unchanged_bitwise"]
    on_grid = ~np.isnan(diff.columns[flat_key("low_coverage_null", RHO[0])]) & (options.compare == "bf16")
    room, threads = room_of(options, resident()), options.threads or default_threads()
    for index, pair in enumerate(pairs):
        views = matrices_of(pair.name, pair.base.shape) if pair.base.kind is Kind.FLOAT else []
        if unchanged[index]:
            yield TensorSpectra(index, tuple(_failed("the update is zero") for _ in views))
            continue
        job = _Job(pair, shards, options, room, bool(on_grid[index]))
        found = []
        for view in views:
            with blas_threads(threads if view.long * view.short > _SMALL else 1):
                found.append(job.measure(view))
        yield TensorSpectra(index, tuple(found))


@dataclass(frozen=True, slots=True)
class _Job:
    """What the matrices of one tensor have in common."""

    pair: TensorPair
    shards: OpenShards
    options: Options
    room: Room
    on_grid: bool

    def measure(self, view: MatrixView) -> MatrixSpectra:
        """Measure one matrix in the mode that was asked for, or in the one that it allows."""
        wanted = self._wanted
        note = self._too_large(view) if wanted.mode == "exact" else ""
        exact = wanted.mode == "exact" and not note
        needed = exact_bytes(view, False) if exact else self._randomized_bytes(view, 4)
        if needed > self.room.free:
            return _failed(f"it takes {needed >> 20} MiB, and --max-memory leaves {self.room.free >> 20} MiB")
        source = self._source(view, np.dtype(np.float64 if exact else np.float32), needed)
        (known,) = run_together(source, survey())
        reason = _unmeasurable(known)
        if reason:
            return _failed(reason)
        if exact:
            together = exact_bytes(view, True) <= self.room.free
            return measure_exact(source, known, view, self.on_grid, together)
        if not all(_SAFE[0] < norm < _SAFE[1] for norm in (known.base_norm, known.delta_norm) if norm):
            source = self._source(view, np.dtype(np.float64), self._randomized_bytes(view, 8))
        found = measure_randomized(source, known, view, self.on_grid, wanted)
        return replace(found, reasons=(*([note] if note else []), *found.reasons))

    @property
    def _wanted(self) -> SpectraOptions:
        assert self.options.spectra is not None
        return self.options.spectra

    def _randomized_bytes(self, view: MatrixView, itemsize: int) -> int:
        return randomized_bytes(view, itemsize, self._wanted.block * self._wanted.steps)

    def _too_large(self, view: MatrixView) -> str:
        """Why exact mode falls back to randomized."""
        if view.short > self._wanted.limit:
            return f"both sides are longer than {self._wanted.limit}: randomized"
        needed = exact_bytes(view, False)
        if needed > self.room.free:
            return f"exact takes {needed >> 20} MiB, and --max-memory leaves {self.room.free >> 20} MiB: randomized"
        return ""

    def _source(self, view: MatrixView, dtype: np.dtype[Any], needed: int) -> PanelSource:
        """The matrix in memory if it fits beside the work space, else read in every pass."""
        stored = FORMATS[self.pair.base.dtype.lower()], FORMATS[self.pair.tuned.dtype.lower()]
        formats = *stored, compare_format(*stored, self.options.compare)
        panels = StoredPanels(self.shards, self.pair, formats, view, dtype)
        fits = needed + cache_bytes(view, dtype.itemsize) <= self.room.free
        return panels.cached() if fits else panels


def _failed(reason: str) -> MatrixSpectra:
    return MatrixSpectra("", reasons=(reason,))


def _unmeasurable(known: Survey) -> str:
    if not math.isfinite(known.base_norm) or not math.isfinite(known.delta_norm):
        return "NaN or Inf in it"
    return "" if known.delta_norm else "the update is zero"


class SpectraTable:
    """The columns of a :class:`~ckptdiff.metrics.spectral.Spectra` as they fill."""

    def __init__(self, mode: str, tensors: int) -> None:
        self._spectra = Spectra.empty(mode, tensors)
        self._methods, self._reasons = [""] * tensors, [""] * tensors

    def take(self, tensor: TensorSpectra) -> None:
        """Note one tensor: its figures, or the medians over its matrices."""
        row, measured = tensor.index, [matrix for matrix in tensor.matrices if matrix.method]
        self._spectra.matrices[row] = len(tensor.matrices)
        self._methods[row] = tensor.method
        self._reasons[row] = "; ".join(dict.fromkeys(reason for m in tensor.matrices for reason in m.reasons))
        self._spectra.ranks[row] = max((len(matrix.values["delta"]) for matrix in measured), default=0)
        for key in SPECTRAL_KEYS:
            self._spectra.columns[key][row] = _median([matrix.figures.get(key, math.nan) for matrix in measured])

    def finish(self) -> Spectra:
        """The table."""
        return replace(self._spectra, methods=tuple(self._methods), reasons=tuple(self._reasons))


def _median(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return float(np.median(defined)) if defined else math.nan
