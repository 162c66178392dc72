"""Project the memory that the spectra of a matrix take. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ckptdiff.linalg.angles import compared_rank
from ckptdiff.linalg.krylov import KrylovOptions
from ckptdiff.measure.thresholds import RHO, principal_rank
from ckptdiff.memory import SPECTRA_MEMORY, default_bound, room_to_grow
from ckptdiff.options import Options, SpectraMode, SpectraOptions, default_threads
from ckptdiff.spectra.matrices import MatrixView
from ckptdiff.spectra.panels import GPU_PANEL, PANEL

_USUAL = 300_000_000
"""What a process that runs nothing but ckptdiff holds before the spectra begin, at most."""


@dataclass(frozen=True, slots=True)
class WorkSpace:
    """What it takes to measure a matrix, beside the matrix."""

    panel: int = PANEL
    """Entries of a panel, about."""
    solver: int = 0
    """Matrices of the short side that the solver of eigenproblems takes for itself."""
    together: int = 1
    """Matrices of one shape that are measured at a time, at most, if a panel holds so many."""

    def randomized(self, view: MatrixView, itemsize: int, krylov: int) -> int:
        """Bytes of randomized mode.

        The Gram matrix, its copy and the eigenvectors it gives, then the products of the projection with their float64
        copies.
        """
        short, rank = view.short, principal_rank(RHO[-1], view.short) + 1
        leading = 2 * (itemsize + 8) * short * krylov if short > 2 * krylov else 16 * short * short
        if 2 * krylov < short <= KrylovOptions().gram:
            leading += itemsize * short * short
        decomposed = (1 + max(self.solver, 1)) * itemsize * short * short + 3 * itemsize * short * rank
        projected = (3 * itemsize + 24) * short * rank + 40 * rank * rank
        return leading + max(decomposed, projected) + self._panels(view, itemsize)

    def exact(self, view: MatrixView, together: bool) -> int:
        """Bytes of exact mode."""
        short = view.short
        squares = 8 * short * short * ((6 if together else 4) + self.solver)
        vectors = 6 * 8 * short * (principal_rank(RHO[-1], short) + compared_rank(short) + 2)
        return squares + vectors + self._panels(view, 8)

    def stack(self, view: MatrixView) -> int:
        """How many matrices of a shape are measured at a time. It tells how many, not memory: digits depend on it."""
        return max(min(self.panel // (view.long * view.short), self.together), 1)

    def stacked(self, view: MatrixView, itemsize: int) -> int:
        """Bytes of so many: of both sides and what is computed of them, of Gram matrices in float64, and of counts."""
        held = 10 * itemsize * view.long * view.short + 8 * (1 + self.solver) * view.short**2
        return self.stack(view) * (held + _COUNTS)

    def least(self, mode: SpectraMode) -> int:
        """Bytes that suffice for the smallest matrix, and for as many of any shape as are measured at a time."""
        itemsize = 8 if mode == "exact" else 4
        if self.together == 1:
            return self._panels(MatrixView(0, 1, 1), itemsize)
        return (10 * itemsize + 8 * (1 + self.solver)) * self.panel + self.together * _COUNTS

    def _panels(self, view: MatrixView, itemsize: int) -> int:
        """A panel of both sides with its raw bytes, and what is computed from it."""
        return 10 * itemsize * max(self.panel, view.short)


_COUNTS = 10 << 20
"""Of the entries of a matrix of a stack, by magnitude and by four scores, with the chances that are added up."""

ON_GPU = WorkSpace(GPU_PANEL, solver=3, together=32)
"""As far as is known: no GPU has run it."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How matrices share memory and threads."""

    spectra: SpectraOptions
    bound: int
    """Bytes that the whole process may take."""
    taken: int
    """Bytes that it holds before the spectra begin."""
    threads: int
    """Slots of the run: each stands for a thread and for its share of the free bytes."""
    space: WorkSpace = WorkSpace()
    knob: str = "--max-memory"
    """The option that sets the bound."""

    @property
    def free(self) -> int:
        """Bytes for all matrices that are measured at a time."""
        return max(self.bound - self.taken, 0)

    @classmethod
    def of(cls, options: Options, taken: int, views: Iterable[MatrixView]) -> Budget:
        """The budget of a run with spectra, of all its matrices, in a process that holds `taken` bytes."""
        spectra, threads = options.spectra, options.threads or default_threads()
        assert spectra is not None
        largest = max((_least(view, spectra) for view in {(v.long, v.short): v for v in views}.values()), default=0)
        bound = options.max_memory or _default_bound(spectra.mode, threads, taken, largest)
        return cls(spectra, bound, taken, threads)

    @classmethod
    def on_gpu(cls, spectra: SpectraOptions, bound: int, taken: int) -> Budget:
        """The budget of a GPU, of whose memory the spectra may take `bound` bytes, and panels take some on their way.

        One matrix is measured at a time: it has all processors of the GPU.
        """
        return cls(spectra, bound, taken, 1, ON_GPU, "--gpu-memory")

    def slots(self, view: MatrixView) -> int:
        """How many slots a matrix takes: as many as hold it, or all if nothing does and it is read in every pass."""
        if not self.free:
            return 1
        return max(1, min(-(-self.threads * self._best(view) // self.free), self.threads))

    def share(self, slots: int) -> int:
        """Bytes of so many slots."""
        return slots * self.free // self.threads

    def takes(self, view: MatrixView) -> int:
        """Bytes that a matrix takes, as far as its shape tells, with those beside it; 0 if there is no room for it."""
        if self.stack(view) > 1:
            return self.space.stacked(view, 8 if self.spectra.mode == "exact" else 4)
        needed = self.needs(view)
        return 0 if needed > self.free else max(needed, min(self._best(view), self.share(self.slots(view))))

    def stack(self, view: MatrixView) -> int:
        """How many matrices of a shape are measured at a time; 1 for one that is measured alone."""
        if self.spectra.mode == "exact" and view.short > self.spectra.limit:
            return 1
        return self.space.stack(view)

    def needs(self, view: MatrixView) -> int:
        """Bytes that a matrix needs at least, in the mode that it allows."""
        return self.space.exact(view, False) if self.exact(view) else self.randomized_bytes(view, 4)

    def exact(self, view: MatrixView) -> bool:
        """Whether a matrix is measured in exact mode."""
        return self.spectra.mode == "exact" and not self.too_large(view)

    def too_large(self, view: MatrixView) -> str:
        """Why exact mode falls back to randomized, in words."""
        if view.short > self.spectra.limit:
            return f"both sides are longer than {self.spectra.limit}: randomized"
        needed = self.space.exact(view, False)
        if needed > self.free:
            return f"exact takes {needed >> 20} MiB, and {self.knob} leaves {self.free >> 20} MiB: randomized"
        return ""

    def randomized_bytes(self, view: MatrixView, itemsize: int) -> int:
        """Work space of randomized mode, beside a decoded pair."""
        return self.space.randomized(view, itemsize, self.spectra.block * self.spectra.steps)

    def _best(self, view: MatrixView) -> int:
        """Bytes that the quickest way to measure a matrix takes."""
        return self.needs(view) + cache_bytes(view, 8 if self.exact(view) else 4)


def _least(view: MatrixView, spectra: SpectraOptions) -> int:
    """Bytes that a matrix needs at least in the mode that is asked for, or in the other if it is too long for it."""
    if spectra.mode == "exact" and view.short <= spectra.limit:
        return WorkSpace().exact(view, False)
    return WorkSpace().randomized(view, 4, spectra.block * spectra.steps)


def _default_bound(mode: SpectraMode, threads: int, taken: int, largest: int) -> int:
    """The bound where the user gave none.

    It grows with the threads, so that each may have a matrix of its own, and to what the largest matrix needs; but
    to half of the machine's memory at most. What a larger program holds already does not count against it.
    """
    usual, larger = SPECTRA_MEMORY[mode], max(taken - _USUAL, 0)
    needed = max(usual * threads // 2, min(taken, _USUAL) + largest)
    return default_bound(usual, needed, room_to_grow()) + larger


def cache_bytes(view: MatrixView, itemsize: int) -> int:
    """Bytes of a decoded pair."""
    return 2 * itemsize * view.long * view.short
