"""Compute on a GPU: the array API for what it can say, our own kernels for histograms, cuSOLVER for eigenproblems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.formats import FORMATS
from ckptdiff.linalg.cusolver import eigenpairs
from ckptdiff.linalg.library import MAGNITUDES, Array, ScoreWindow
from ckptdiff.linalg.on_any import AnyLibrary
from ckptdiff.measure.cuda.gpu import Buffer, CupyGpu, Gpu, Stream

_FIELDS = 8
"""What kernels count of each entry by its score; see `cuda/spectra.cu`."""
_CERTAIN = 1 << 31
"""A chance of one, as kernels add chances up: integers, so that no digit depends on the order."""
_ANY_FORMATS = (FORMATS["bf16"],) * 3
"""Of kernels that read floats: those of any formats do."""


@dataclass(frozen=True, slots=True)
class GpuLibrary(AnyLibrary):
    """The arrays of a GPU, with counts by its kernels; see :class:`~ckptdiff.linalg.library.Library`."""

    gpu: Gpu = field(kw_only=True)
    stream: Stream = field(kw_only=True)
    """On which all arrays are computed."""
    array: Callable[[Buffer, np.dtype[Any], tuple[int, int]], Array] = field(kw_only=True)
    """Gives the start of a buffer as an array, for what is computed after all that the stream holds by then."""

    def count_magnitudes(self, counts: Any, base: Array, delta: Array, threshold: float) -> Any:
        """Count by magnitude."""
        if counts is None:
            counts = self.zeros((3 * MAGNITUDES,), np.int64)
        self._launch("magnitudes", base, base, delta, *self._size(base, threshold), counts)
        return counts

    def magnitudes(self, counts: Any) -> NDArray[np.int64]:
        """What was counted."""
        return self.home(counts).reshape(3, MAGNITUDES)

    def count_scores(
        self, counts: Any, scores: Array, base: Array, delta: Array, window: ScoreWindow, threshold: float
    ) -> Any:
        """Count by score."""
        if counts is None:
            chances = np.rint(window.chances * _CERTAIN).astype(np.uint32)
            counts = self.zeros((window.bins + 1, _FIELDS), np.int64), self.put(chances)
        numel, size = self._size(base, threshold)
        bins = (np.uint32(number) for number in (window.shift, window.start, window.bins, window.low[0]))
        self._launch("scores", base, scores, base, delta, numel, *bins, size, counts[1], counts[0])
        return counts

    def scores(self, counts: Any, window: ScoreWindow) -> NDArray[np.float64]:
        """What was counted."""
        counted = self.home(counts[0]).astype(np.float64)
        beyond, tied = counted[:, 3:5], counted[:, 5:7]  # each of the changed, and of those above the threshold
        return np.concatenate([counted[:, :3], beyond + window.low[1] * tied, counted[:, 7:] / _CERTAIN], axis=1)

    def _size(self, values: Array, threshold: float) -> tuple[np.uint64, np.uint32]:
        """How many entries there are, and the bits of a threshold."""
        return np.uint64(values.shape[0] * values.shape[1]), np.float32(threshold).view(np.uint32)

    def _launch(self, kernel: str, kind: Array, *args: Any) -> None:
        name = f"{kernel}_float{8 * self.itemsize(kind)}"
        self.gpu.launch(_ANY_FORMATS, name, 8 * self.gpu.processors, args, self.stream)


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

    def _eigenpairs(self, matrix: Array, first: int, last: int) -> tuple[Array, Array]:
        return eigenpairs(self.xp, matrix, first, last)

    def _solved(self, factor: Array, right: Array) -> Array:
        from cupyx.scipy.linalg import solve_triangular

        return solve_triangular(factor, right, lower=True)


def _start_of(buffer: Buffer, dtype: np.dtype[Any], shape: tuple[int, int]) -> Array:
    return buffer[: shape[0] * shape[1] * dtype.itemsize].view(dtype).reshape(shape)


@contextmanager
def in_use(gpu: CupyGpu, stream: Stream, memory: int) -> Iterator[None]:
    """Let this thread compute with CuPy as figures need it, in so many bytes of GPU memory.

    On one stream; in full float32, whatever CUPY_TF32 says; and a cuSOLVER routine that fails raises, where CuPy would
    go on with what it left.
    """
    import cupyx
    from cupy._core import _routines_linalg as routines

    cupy, single = gpu.cupy, np.dtype(np.float32)
    pool = cupy.get_default_memory_pool()
    before = routines.get_compute_type(single)
    routines.set_compute_type(single, routines.COMPUTE_TYPE_DEFAULT)
    try:
        with cupy.cuda.Device(gpu.index), stream, cupyx.errstate(linalg="raise"):
            limit = pool.get_limit()
            pool.set_limit(size=memory)
            try:
                yield
            finally:
                pool.set_limit(size=limit)
    finally:
        routines.set_compute_type(single, before)
