"""Which backend measures, and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from ckptdiff.backends.backend import Backend, Batching
from ckptdiff.backends.formats import Format, Formats
from ckptdiff.backends.kernels.fetch import WINDOW
from ckptdiff.backends.partial import BLOCK, Partial, Refined, Rule, Scan, Targets
from ckptdiff.backends.source import InMemory
from ckptdiff.errors import DeviceError, PlanError
from ckptdiff.memory import resident
from ckptdiff.metrics.catalogue import EPS, ETA
from ckptdiff.metrics.columns import LARGEST, SMALLEST, empty_records, set_sizes
from ckptdiff.metrics.measurement import FloatMeasurement
from ckptdiff.metrics.small import wanted
from ckptdiff.options import MaskRule, Options, default_threads
from ckptdiff.runfile.compress import compress_chunk

__all__ = ["Device", "open_device"]


def _no_scratch(numel: int) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Device:
    """A backend that was chosen and found to work.

    Attributes
    ----------
    name : str
    worker : callable
        Makes the backend of one thread.
    batches : bool
        Whether that backend is :class:`~ckptdiff.backends.backend.Batching`.
    scratch : callable
        Bytes of work space that a thread needs for a pair of a number of coordinates, beside the blocks themselves.
    threads : int
        Most threads it can serve; 0 for any number.
    overhead : int
        Bytes of host memory that its driver and libraries took.
    note : str
        Why it was chosen, if that needs saying.
    """

    name: str
    worker: Callable[[], Backend]
    batches: bool
    scratch: Callable[[int], int] = _no_scratch
    threads: int = 0
    overhead: int = 0
    note: str = ""

    def warm_up(self, alike: Iterable[Formats], alone: Iterable[Formats], mask_chunk: int) -> None:
        """Load or compile the kernels that a run will call, so that what it measures next is time and memory of data.

        Parameters
        ----------
        alike, alone : iterable of (base, tuned, compare)
            Formats of small tensors that are measured in one call, and of all others.
        mask_chunk : int
            Bytes of the largest mask chunk, 0 without masks.
        """
        worker = self.worker()
        for formats in alike:
            assert isinstance(worker, Batching)
            _warm_small(worker, *formats)
        for formats in alone:
            _warm_large(worker, *formats)
        if mask_chunk:
            compress_chunk(np.arange(mask_chunk).astype(np.uint8), mask_chunk)


def _warm_small(worker: Batching, base: Format, tuned: Format, compare: Format) -> None:
    scan = Scan(base, tuned, compare, EPS, ETA, Rule.BITWISE, want_mask=True)
    numel = np.array([2])
    # Two coordinates of what the buffers of the kernel hold by themselves.
    places = np.array([[WINDOW, 0, WINDOW, 0, 2]])
    worker.scan_small(
        scan, places, (set_sizes(LARGEST, numel), set_sizes(SMALLEST, numel)), wanted(compare), empty_records(1)
    )


def _warm_large(worker: Backend, base: Format, tuned: Format, compare: Format) -> None:
    measurement = FloatMeasurement(base, tuned, compare, 2, MaskRule("bitwise"), True)
    # Two coordinates of which one changed: what nothing or everything changed in takes shorter ways.
    sides = bytes(base.bits // 4), bytes(tuned.bits // 8) + b"\x3c" * (tuned.bits // 8)
    source = InMemory(np.frombuffer(sides[0], np.uint8), np.frombuffer(sides[1], np.uint8), 2)
    partial = Partial()
    if compare.bits > 16:  # narrower formats seldom need a second pass
        targets = Targets(16)
        worker.refine(measurement.scan, targets, source, Refined.empty(targets))
    worker.scan(replace(measurement.scan, want_mask=True), source, partial)
    measurement.take(partial)
    if measurement.next is None:
        measurement.measured()


def open_device(options: Options) -> Device:
    """Choose a backend.

    Parameters
    ----------
    options : Options
        ``device`` is "cpu" for the Numba kernels, "cuda" or "cuda:N" for a GPU, "auto" for a GPU if one works and else
        the processor, "reference" for NumPy.

    Raises
    ------
    DeviceError, PlanError
        If a GPU is asked for and cannot be used, or has too little memory.
    """
    if options.device == "reference":
        from ckptdiff.backends.reference import ReferenceWorker

        return Device("reference", ReferenceWorker, batches=False, scratch=lambda numel: 240 * min(numel, BLOCK))
    note = ""
    if options.device != "cpu":
        try:
            return _open_gpu(options)
        except (DeviceError, PlanError) as error:
            if options.device != "auto":
                raise
            note = f"no GPU: {error.problem}"
    from ckptdiff.backends.cpu import CpuWorker

    return Device("cpu", CpuWorker, batches=True, note=note)


def _open_gpu(options: Options) -> Device:
    """A GPU on which a kernel really ran, and as much room on it as the threads need."""
    from ckptdiff.backends.cuda.choice import find_gpu
    from ckptdiff.backends.cuda.gpu import CupyGpu
    from ckptdiff.backends.cuda.slots import Room, fit_room
    from ckptdiff.backends.cuda.worker import CudaWorker
    from ckptdiff.backends.self_test import self_test

    before = resident()
    index = int(options.device.partition(":")[2] or 0)
    gpu = find_gpu(index)
    free, _ = gpu.free_memory()
    room, threads = fit_room(options.gpu_memory or free // 2, options.threads or default_threads())
    wrong = self_test(CudaWorker(gpu, Room.smallest()))
    if wrong is not None:
        raise DeviceError("the GPU computes wrong figures", found=wrong, hint="--device cpu, and report this")

    def worker() -> Backend:
        return CudaWorker(CupyGpu(index), room)  # in the thread that will use it

    return Device(gpu.name, worker, True, lambda numel: room.host_bytes, threads, resident() - before)
