"""From two checkpoints to an adapter, one tensor at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ckptdiff.backends.formats import formats_of
from ckptdiff.checkpoint import Kind, TensorInfo, TensorPair
from ckptdiff.engine import run
from ckptdiff.errors import PairingError
from ckptdiff.events import Listener, StageProgress
from ckptdiff.exports.linear_layers import refusal
from ckptdiff.linalg.blas import require_scipy
from ckptdiff.linalg.threads import one_blas_thread, product_threads
from ckptdiff.lora.adapter import AdapterWriter
from ckptdiff.lora.factors import Factors, factorize
from ckptdiff.memory import resident
from ckptdiff.options import MaskRule, Options, default_threads
from ckptdiff.planning import prepare
from ckptdiff.report.text import percent
from ckptdiff.result import Diff
from ckptdiff.runfile.staged import StagedFile
from ckptdiff.runfile.staged_folder import StagedFolder
from ckptdiff.runfile.target import check_new
from ckptdiff.spectra.matrices import MatrixView, matrices_of
from ckptdiff.spectra.memory import cache_bytes, default_bound
from ckptdiff.spectra.source import StoredPanels
from ckptdiff.stream.shards import OpenShards, open_shards

__all__ = ["Extracted", "Extraction", "extract_lora"]

_MEMORY = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Extracted:
    """What became of the update of one tensor.

    Attributes
    ----------
    name : str
    shape : tuple of int
    delta_norm : float
        Frobenius norm of its update.
    rank : int
        Of its factors; 0 if the adapter leaves it out.
    lost : float
        Share of its energy, sum d^2, that the adapter does not hold.
    reason : str, optional
        Why it is left out.
    """

    name: str
    shape: tuple[int, ...]
    delta_norm: float
    rank: int
    lost: float
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Extraction:
    """An adapter that was written.

    Attributes
    ----------
    folder : Path
    tensors : tuple of Extracted
        Every tensor with an update.
    unchanged : int
        Tensors without one.
    """

    folder: Path
    tensors: tuple[Extracted, ...]
    unchanged: int

    @property
    def lost(self) -> float:
        """Share of the energy of the whole update that the adapter does not hold."""
        total = sum(tensor.delta_norm**2 for tensor in self.tensors)
        return sum(tensor.lost * tensor.delta_norm**2 for tensor in self.tensors) / total if total else 0.0


def extract_lora(
    base: str,
    tuned: str,
    folder: Path,
    *,
    rank: int,
    energy: float | None = None,
    seed: int = 0,
    options: Options | None = None,
    listener: Listener | None = None,
) -> Extraction:
    """Write the update between two checkpoints as a PEFT adapter.

    Values are compared as they are stored, in float32 where the dtypes differ.

    Parameters
    ----------
    base, tuned : str
        Paths of the checkpoints.
    folder : Path
        To be made.
    rank : int
        Of the factors; the largest one if `energy` is given.
    energy : float, optional
        Share of each tensor's energy to keep.
    seed : int
        Of the randomized SVD.
    options : Options, optional
        Which tensors, and how they are paired and read.
    listener : callable, optional
        Called with every event of the comparison, then with a `StageProgress` for each tensor that changed.

    Raises
    ------
    CkptdiffError
        If an input cannot be used, nothing changed that an adapter can hold, the folder exists, or SciPy is missing.
    """
    require_scipy()
    options = replace(options or Options(), compare="stored", mask=MaskRule("none"), spectra=None)
    check_new(folder)
    diff = run(base, tuned, options=options, listener=listener)
    plan = prepare(base, tuned, options=options, read_data=False)
    strange = diff.columns["nonfinite_base"] + diff.columns["nonfinite_tuned"] > 0
    norms = diff.columns["delta_norm"]
    moved = [(row, pair) for row, pair in enumerate(plan.pairs) if norms[row] > 0]
    found: list[Extracted] = []
    with StagedFolder(folder) as made:
        with open_shards(plan.io) as shards, StagedFile(made.path / "factors") as spool:
            writer = AdapterWriter(made.path, base, spool)
            job = _Job(shards, options, writer, rank, energy, seed)
            for index, (row, pair) in enumerate(moved):
                reason = "NaN or Inf in it" if strange[row] else _refusal(pair.base)
                found.append(job.extract(pair, float(norms[row]), reason))
                if listener is not None:
                    listener(StageProgress("factors", index, len(moved), pair.name, _outcome(found[-1])))
            if not any(tensor.rank for tensor in found):
                raise _nothing(diff, found)
            writer.finish()
        made.commit()
    return Extraction(folder, tuple(found), len(plan.pairs) - len(found))


def _refusal(tensor: TensorInfo) -> str | None:
    return refusal(tensor.name, tensor.shape, tensor.kind is Kind.FLOAT)


def _outcome(tensor: Extracted) -> str:
    return f"left out: {tensor.reason}" if tensor.reason else f"rank {tensor.rank}, {percent(tensor.lost)} lost"


def _nothing(diff: Diff, found: list[Extracted]) -> PairingError:
    return PairingError(
        "no update that an adapter of linear layers could hold",
        file=str(diff.tuned["path"]),
        expected="matrices that changed",
        found=f"{len(found)} other tensors that changed" if found else "no tensor that changed",
    )


@dataclass(frozen=True, slots=True)
class _Job:
    shards: OpenShards
    options: Options
    writer: AdapterWriter
    rank: int
    energy: float | None
    seed: int

    def extract(self, pair: TensorPair, norm: float, reason: str | None) -> Extracted:
        """Factor one tensor and write it, or say why not."""
        if reason is not None:
            return Extracted(pair.name, pair.base.shape, norm, 0, 1.0, reason)
        (view,) = matrices_of(pair.name, pair.base.shape)
        factors = self._factors(pair, view, norm)
        up, down = factors.long_side, factors.short_side
        if view.wide:
            up, down = down, up
        self.writer.add(pair.name.removesuffix(".weight"), down.T, up)
        return Extracted(pair.name, pair.base.shape, norm, factors.rank, factors.lost)

    def _factors(self, pair: TensorPair, view: MatrixView, norm: float) -> Factors:
        dtype = np.dtype(np.float32 if 1e-12 < norm < 1e12 else np.float64)
        formats = formats_of(pair.base.dtype, pair.tuned.dtype, self.options.compare)
        panels = StoredPanels(self.shards, pair, formats, view, dtype)
        taken = resident()
        free = (self.options.max_memory or default_bound(_MEMORY, taken)) - taken
        fits = 2 * cache_bytes(view, dtype.itemsize) < free
        with one_blas_thread(), product_threads(self.options.threads or default_threads()):
            return factorize(panels.cached() if fits else panels, norm, self.rank, self.energy, self.seed)
