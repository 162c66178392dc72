"""Choose the GPU that measures matrices, try it on a small one first, and meet what goes wrong on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ckptdiff.errors import DeviceError, PlanError
from ckptdiff.events import Listener, Note
from ckptdiff.linalg.on_cupy import CupyLibrary, GpuLibrary, in_use
from ckptdiff.linalg.stages import PanelSource
from ckptdiff.measure.cuda.choice import find_gpu
from ckptdiff.measure.cuda.gpu import failure
from ckptdiff.memory import resident
from ckptdiff.options import Options, SpectraMode
from ckptdiff.spectra.budget import ON_GPU, Budget
from ckptdiff.spectra.gpu_panels import GpuPanels, PanelSlots, slots_bytes
from ckptdiff.spectra.panels import StoredPanels
from ckptdiff.spectra.trial import wrong_spectra

Result = TypeVar("Result")

HOST_ROOM = slots_bytes() + (128 << 20)
"""Bytes of host memory beside a GPU: what goes up, and small problems."""
_WHOLE_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""Compute capabilities of half as many float64 operations as of float32; of others they have a 32nd or a 64th."""


@dataclass(frozen=True, slots=True)
class SpectraGpu:
    """A GPU that measures matrices right."""

    name: str
    memory: int
    """Bytes that may be taken there."""
    slots: PanelSlots
    in_use: Callable[[], AbstractContextManager[None]]
    """Within it a thread computes there."""

    def budget(self, options: Options) -> Budget:
        """How matrices share its memory."""
        assert options.spectra is not None
        return Budget.on_gpu(options.spectra, self.memory, self.slots.nbytes)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Let this thread compute there; what fails becomes an error that says what to do, unless memory lacks."""
        with _reported(self.name, self.in_use):
            try:
                yield
            finally:
                self.slots.drain()


def open_spectra_gpu(options: Options, mode: SpectraMode, tell: Listener) -> SpectraGpu | None:
    """The GPU that is asked for, or that works; None if the processor is to measure.

    DeviceError or PlanError if a GPU is asked for and cannot be used; with "auto" a note says why none is used.
    """
    if options.device in ("cpu", "reference"):
        return None
    try:
        found = _open(options, mode)
    except (DeviceError, PlanError) as error:
        if options.device != "auto":
            raise
        tell(Note(f"spectra on the processor: {error.problem}"))
        return None
    tell(Note(f"spectra on {found.name}, in {found.memory >> 20} MiB of it"))
    return found


def _open(options: Options, mode: SpectraMode) -> SpectraGpu:
    gpu = find_gpu(int(options.device.partition(":")[2] or 0))
    capability = gpu.properties["major"], gpu.properties["minor"]
    if mode == "exact" and capability not in _WHOLE_FLOAT64:
        raise DeviceError(
            "the GPU has next to no float64 units, which exact spectra need",
            expected="such as sm_80, sm_90 or sm_100",
            found=f"{gpu.name}, sm_{capability[0]}{capability[1]}",
            hint="--device cpu, or --spectra randomized",
        )
    held = resident() + HOST_ROOM
    if options.max_memory and held > options.max_memory:
        raise PlanError(
            "spectra on a GPU do not fit into --max-memory",
            expected=f"at least {-(-held >> 20)} MiB",
            found=f"{options.max_memory >> 20} MiB",
            hint="a larger --max-memory, or --device cpu",
        )
    memory = options.gpu_memory or gpu.free_memory()[0] // 2
    least = slots_bytes() + ON_GPU.least(mode)
    if memory < least:
        raise PlanError(
            "spectra do not fit into the GPU memory they may use",
            expected=f"at least {-(-least >> 20)} MiB",
            found=f"{memory >> 20} MiB",
            hint="a larger --gpu-memory, close what else uses the GPU, or --device cpu",
        )
    with _reported(gpu.name, lambda: _told_of_memory(gpu.name)):
        library, use = library_on(gpu, memory)
        with use():
            slots = PanelSlots(library)
            wrong = wrong_spectra(slots)
            slots.give_back()
        gpu.release()  # for the coordinate pass comes first
    if wrong:
        raise DeviceError("the GPU computes wrong spectra", found=wrong, hint="--device cpu, and report this")
    return SpectraGpu(gpu.name, memory, slots, use)


def library_on(gpu: Any, memory: int) -> tuple[GpuLibrary, Callable[[], AbstractContextManager[None]]]:
    """The arrays of a GPU that may take so many bytes, and what lets a thread use them."""
    stream = gpu.stream()
    return CupyLibrary(gpu, stream), partial(in_use, gpu, stream, memory)


def source_of(
    panels: StoredPanels, kept: bool, gpu: SpectraGpu | None, room: NDArray[np.uint8] | None = None
) -> PanelSource:
    """A matrix that is decoded once and `kept`, on the processor in `room`, or read in every pass; on a GPU if any."""
    if gpu is not None:
        return GpuPanels(panels, gpu.slots, kept)
    return panels.cached(room) if kept else panels


def or_streamed(gpu: SpectraGpu | None, work: Callable[[int], Result], share: int, name: str) -> Result:
    """What `work` makes of a share of the memory; once more with nothing kept if a GPU has less than it had.

    DeviceError if it does not suffice for that either.
    """
    if gpu is None:
        return work(share)
    with gpu.working(), _told_of_memory(gpu.name, name):
        try:
            return work(share)
        except MemoryError:
            gpu.slots.drain()
        return work(0)


@contextmanager
def _told_of_memory(device: str, name: str = "") -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        problem = f"the GPU lacks memory for the spectra of {name}" if name else "the GPU lacks memory for spectra"
        raise DeviceError(
            problem, found=device, hint="a smaller --gpu-memory, close what else uses the GPU, or --device cpu"
        ) from error


@contextmanager
def _reported(name: str, within: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Turn what CuPy or a solver raises into an error that says what to do; too little memory stays MemoryError."""
    try:
        with within():
            yield
    except (RuntimeError, ImportError, np.linalg.LinAlgError) as error:
        raise failure(error, name) from error
