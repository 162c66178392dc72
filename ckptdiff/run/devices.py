"""Choose the backend that measures, and say what it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ckptdiff.errors import DeviceError, PlanError
from ckptdiff.events import Listener
from ckptdiff.measure.backend import Backend
from ckptdiff.measure.partial import BLOCK
from ckptdiff.memory import resident, room_to_grow
from ckptdiff.options import Options, default_threads
from ckptdiff.run.tasks import GRAIN, Grain
from ckptdiff.run.warm_up import Uses, load, make_call


@dataclass(frozen=True, slots=True)
class Device:
    """A backend that was chosen and found to work."""

    name: str
    worker: Callable[[], Backend]
    """Makes the backend of one thread."""
    batches: bool
    """Whether that backend is :class:`~ckptdiff.measure.backend.Batching`."""
    decodes: bool = False
    """Whether that backend makes values of codes with scales itself."""
    scratch: Callable[[int], int] = lambda numel: 0
    """Bytes of work space that a thread needs for a pair of a number of coordinates, beside the blocks themselves."""
    threads: int = 0
    """Most threads it can serve; 0 for any number."""
    overhead: int = 0
    """Bytes of host memory that its driver and libraries took."""
    grain: Grain = GRAIN
    """How large tasks are, unless a run is told."""
    gpu_bytes: int = 0
    """Bytes of GPU memory that a thread takes."""
    gpu_memory: int = 0
    """Those that all threads may take together."""
    compiled_apart: bool = False
    """Whether another process can compile its kernels for it."""
    note: str = ""
    """Why it was chosen, if that needs saying."""

    def warm_up(self, asked: Uses, tell: Listener) -> None:
        """Load or compile the kernels that a run will call, so that time and memory measured next are those of data."""
        worker = self.worker()
        if self.compiled_apart:
            load(worker, asked, tell)
            return
        for use in asked.certain:
            make_call(worker, use)


def open_device(options: Options) -> Device:
    """Choose a backend; DeviceError or PlanError if a GPU is asked for and cannot be used, or lacks memory."""
    if options.device == "reference":
        from ckptdiff.measure.reference import ReferenceBackend

        return Device("reference", ReferenceBackend, batches=False, scratch=lambda numel: 240 * min(numel, BLOCK))
    note = ""
    if options.device != "cpu":
        try:
            return _open_gpu(options)
        except (DeviceError, PlanError) as error:
            if options.device != "auto":
                raise
            note = f"no GPU: {error.problem}"
    from ckptdiff.measure.cpu import CpuBackend

    return Device("cpu", CpuBackend, batches=True, compiled_apart=True, note=note)


def _open_gpu(options: Options) -> Device:
    """A GPU that passed the whole self-test, and as much room on it as the threads need."""
    from ckptdiff.measure.cuda.choice import find_gpu

    before = resident()
    index = int(options.device.partition(":")[2] or 0)
    gpu = find_gpu(index)
    # Once there is one.
    from ckptdiff.measure.cuda.backend import CudaBackend
    from ckptdiff.measure.cuda.gpu import CupyGpu
    from ckptdiff.measure.cuda.slots import Room, fit_room
    from ckptdiff.measure.self_test import wrong_figures

    free, _ = gpu.free_memory()
    allowed, held = options.gpu_memory or free // 2, resident()
    on_host = (options.max_memory - held if options.max_memory else room_to_grow(held)) // 2
    room, threads = fit_room(allowed, on_host, options.threads or default_threads())
    wrong = wrong_figures(CudaBackend(gpu, Room.smallest()))
    gpu.release()  # what was small is of no use to the threads
    if wrong:
        raise DeviceError("the GPU computes wrong figures", found=wrong, hint="--device cpu, and report this")

    def worker() -> Backend:
        return CudaBackend(CupyGpu(index), room)  # in the thread that will use it

    return Device(
        gpu.name,
        worker,
        batches=True,
        decodes=True,
        scratch=lambda numel: room.host_bytes,
        threads=threads,
        overhead=resident() - before,
        grain=Grain(blocks=room.task_blocks),
        gpu_bytes=room.gpu_bytes,
        gpu_memory=allowed,
    )
