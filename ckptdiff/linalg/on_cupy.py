"""Compute on a GPU: the array API for what it can say, our own kernels for histograms, cuSOLVER for eigenproblems."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.formats import FORMATS
from ckptdiff.linalg.cusolver import eigenpairs, eigenpairs_of_each
from ckptdiff.linalg.library import MAGNITUDES, Array, ScoreWindow, Windows
from ckptdiff.linalg.on_any import AnyLibrary
from ckptdiff.measure.cuda.gpu import Buffer, CupyGpu, Gpu, Stream

_FIELDS = 8
"""What kernels count of each entry by its score; see `cuda/spectra.cu`."""
_CERTAIN = 1 << 31
"""A chance of one, as kernels add chances up: integers, so that no digit depends on the order."""
_SQUARED_ROWS = 64
"""Rows of a column whose squares are added up at a time: then there are many such sums, and few beside the entries."""
_ANY_FORMATS = (FORMATS["bf16"],) * 3
"""Of kernels that read floats: those of any formats do."""


@dataclass(frozen=True, slots=True)
class GpuLibrary(AnyLibrary):
    """The arrays of a GPU, with counts and squares by its kernels; see :class:`~ckptdiff.linalg.library.Library`."""

    gpu: Gpu = field(kw_only=True)
    stream: Stream = field(kw_only=True)
    """On which all arrays are computed."""
    array: Callable[[Buffer, np.dtype[Any], tuple[int, ...]], Array] = field(kw_only=True)
    """Gives the start of a buffer as an array, for what is computed after all that the stream holds by then."""

    def squares(self, values: Array, *, by_column: bool = False) -> Array:
        """Sum of squares, in one pass over them; the standard would have to copy all of them to float64."""
        *stack, rows, columns = values.shape
        sums = self.zeros((*stack, -(-rows // _SQUARED_ROWS), columns), np.float64)
        sizes = rows, columns, math.prod(stack), _SQUARED_ROWS
        given = (values, *map(np.uint64, sizes), sums)
        name = f"squares_float{8 * self.itemsize(values)}"
        self.gpu.launch(_ANY_FORMATS, name, 8 * self.gpu.processors, given, self.stream)
        return self.xp.sum(sums, axis=-2 if by_column else (-2, -1))

    def count_magnitudes(self, counts: Any, base: Array, delta: Array, threshold: float) -> Any:
        """Count by magnitude."""
        members = math.prod(base.shape[:-2])
        if counts is None:
            counts = self.zeros((members, 3 * MAGNITUDES), np.int64)
        self._launch("magnitudes", members, (base, delta), _bits(threshold), counts)
        return counts

    def magnitudes(self, counts: Any) -> list[NDArray[np.int64]]:
        """What was counted."""
        return list(self.home(counts).reshape(-1, 3, MAGNITUDES))

    def count_scores(
        self, counts: Any, scores: Array, base: Array, delta: Array, windows: Windows, threshold: float
    ) -> Any:
        """Count by score."""
        members, room = len(windows), max(window.bins for window in windows if window)
        if counts is None:
            chances, places = np.zeros((members, MAGNITUDES), np.uint32), np.zeros((members, 4), np.uint32)
            for member, window in enumerate(windows):
                if window:
                    chances[member] = np.rint(window.chances * _CERTAIN)
                    places[member] = window.shift, window.start, window.bins, window.low[0]
            counts = self.zeros((members, room + 1, _FIELDS), np.int64), self.put(chances), self.put(places)
        found, weighed, opened = counts
        self._launch(
            "scores", members, (scores, base, delta), opened, np.uint32(room), _bits(threshold), weighed, found
        )
        return counts

    def scores(self, counts: Any, windows: Windows) -> list[NDArray[np.float64]]:
        """What was counted."""
        return [_tallied(found, window) for found, window in zip(self.home(counts[0]), windows, strict=True)]

    def _launch(self, kernel: str, members: int, panels: tuple[Array, ...], *args: Any) -> None:
        """Let a kernel count so many matrices of stacks, as many blocks for each."""
        *_, rows, columns = panels[0].shape
        blocks = max(8 * self.gpu.processors // members, 1) * members
        name = f"{kernel}_float{8 * self.itemsize(panels[0])}"
        given = (*panels, np.uint64(rows * columns), np.uint32(members), *args)
        self.gpu.launch(_ANY_FORMATS, name, blocks, given, self.stream)


def _bits(threshold: float) -> np.uint32:
    return np.float32(threshold).view(np.uint32)


def _tallied(found: NDArray[np.int64], window: ScoreWindow | None) -> NDArray[np.float64]:
    """What a kernel counted of a matrix, in floats; there may be more bins than it has."""
    if window is None:
        return np.empty(0)
    found = found[: window.bins + 1]
    tally = np.empty((len(found), 6))
    tally[:, :5] = found[:, :5]
    tally[:, 3:5] += window.low[1] * found[:, 5:7]  # of the changed, and of those above the threshold, at the cut
    np.divide(found[:, 7], _CERTAIN, out=tally[:, 5])
    return tally


class CupyLibrary(GpuLibrary):
    """CuPy's arrays on the stream that is current when it is made; in use within :func:`in_use`."""

    def __init__(self, gpu: CupyGpu, stream: Stream, host_rows: int = 512) -> None:
        super().__init__(gpu.cupy, None, host_rows, gpu=gpu, stream=stream, array=_start_of)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Zeros of a NumPy dtype."""
        return self.xp.zeros(shape, dtype)

    def put(self, values: NDArray[Any]) -> Array:
        """A small array of the host, on the device."""
        return self.xp.asarray(np.ascontiguousarray(values))

    def home(self, values: Array) -> NDArray[Any]:
        """A small array, on the host."""
        found: NDArray[Any] = values.get()
        return found

    def cast(self, values: Array, dtype: Any) -> Array:
        """The same values in a NumPy dtype."""
        return values.astype(dtype, copy=False)

    def contiguous(self, values: Array) -> Array:
        """The same values row by row."""
        return self.xp.ascontiguousarray(values)

    def _eigenvalues(self, matrix: Array) -> Array:
        if matrix.ndim > 2:
            return eigenpairs_of_each(self.xp, matrix, vectors=False)[0]
        return self.xp.linalg.eigvalsh(matrix)

    def _eigenpairs(self, matrix: Array, first: int, last: int) -> tuple[Array, Array]:
        if matrix.ndim > 2:
            values, vectors = eigenpairs_of_each(self.xp, matrix)
            return values[:, first : last + 1], vectors[..., first : last + 1]
        return eigenpairs(self.xp, matrix, first, last)

    def _solved(self, factor: Array, right: Array) -> Array:
        from cupyx.scipy.linalg import solve_triangular

        return solve_triangular(factor, right, lower=True)


def _start_of(buffer: Buffer, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    return buffer[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


@contextmanager
def in_use(gpu: CupyGpu, stream: Stream, memory: int) -> Iterator[None]:
    """Let this thread compute with CuPy as figures need it, in so many bytes of GPU memory.

    On one stream; in full float32, whatever CUPY_TF32 says; and a cuSOLVER routine that fails raises, where CuPy would
    go on with what it left. What CuPy keeps for whoever asks next counts as taken there, also what only another stream
    may use: so it is given back where memory would lack else.
    """
    import cupyx
    from cupy._core import _routines_linalg as routines

    cupy, single = gpu.cupy, np.dtype(np.float32)
    pool = cupy.get_default_memory_pool()
    before = routines.get_compute_type(single)
    routines.set_compute_type(single, routines.COMPUTE_TYPE_DEFAULT)
    try:
        allocator = cupy.cuda.using_allocator(lambda size: _allocated(pool, size))
        with cupy.cuda.Device(gpu.index), stream, cupyx.errstate(linalg="raise"), allocator:
            limit = pool.get_limit()
            pool.set_limit(size=memory)
            try:
                yield
            finally:
                pool.set_limit(size=limit)
    finally:
        routines.set_compute_type(single, before)


def _allocated(pool: Any, size: int) -> Any:
    try:
        return pool.malloc(size)
    except MemoryError:
        pool.free_all_blocks()
    return pool.malloc(size)
