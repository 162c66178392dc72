"""Define what the pipeline asks of a GPU, and answer it with CuPy.

The tests answer with a device of their own, which runs the same kernels on the CPU in any order that streams and events
allow. So nothing here knows what is computed.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, cast

import numpy as np

from ckptdiff.errors import CkptdiffError, DeviceError
from ckptdiff.formats import Formats
from ckptdiff.measure.cuda.compiled import KERNEL_NAMES, THREADS, architecture_for, compiled_kernels
from ckptdiff.measure.source import ByteArray

Buffer = Any
"""Bytes in GPU memory. Slicing gives a part of it."""
Stream = Any
Event = Any


class Gpu(Protocol):
    """Queues work. All methods return at once but ``synchronize``, ``finish`` and those that allocate."""

    @property
    def processors(self) -> int:
        """Multiprocessors."""

    def pinned(self, size: int) -> ByteArray:
        """Page-locked host memory, which copies can use without waiting; MemoryError if there is not enough."""

    def empty(self, size: int) -> Buffer:
        """GPU memory, holding anything; MemoryError if there is not enough."""

    def stream(self) -> Stream:
        """A queue whose work runs in order, and in no order with other queues."""

    def upload(self, target: Buffer, origin: ByteArray, stream: Stream) -> None:
        """Queue a copy from pinned memory; ``target`` may be larger."""

    def download(self, target: ByteArray, origin: Buffer, stream: Stream) -> None:
        """Queue a copy into pinned memory; ``origin`` may be larger."""

    def clear(self, target: Buffer, stream: Stream) -> None:
        """Queue zeros."""

    def launch(self, formats: Formats, kernel: str, blocks: int, args: Sequence[Any], stream: Stream) -> None:
        """Queue a kernel. Buffers go by address, None as a null pointer, NumPy scalars and arrays of one by value."""

    def record(self, stream: Stream, event: Event | None = None) -> Event:
        """What happens once all that is queued so far is done: an event that is given, from now on, else a new one."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Let what is queued from now on wait for an event of another stream."""

    def synchronize(self, event: Event) -> None:
        """Wait until it has happened."""

    def finish(self, stream: Stream) -> None:
        """Wait until all that is queued in it is done."""


Method = TypeVar("Method", bound=Callable[..., Any])


def _reported(method: Method) -> Method:
    """Turn what CuPy raises into an error that says what to do; too little memory stays MemoryError."""

    @functools.wraps(method)
    def call(self: CupyGpu, *args: Any) -> Any:
        try:
            return method(self, *args)
        except (MemoryError, CkptdiffError):
            raise
        except (RuntimeError, ImportError, OSError) as error:
            raise failure(error, self.name) from error

    return cast(Method, call)


_OUT_OF_MEMORY = ("memoryallocation", "outofmemory")
_HINTS = {
    _OUT_OF_MEMORY: "close what else uses the GPU, or --gpu-memory with a smaller size, or fewer --threads",
    ("libcublas", "libcusolver", "libnvjitlink", "cudaheaders"): (
        "pip install 'cupy-cuda13x[ctk]' (or cupy-cuda12x[ctk]), which brings the libraries that spectra need; "
        "or --device cpu"
    ),
    ("insufficientdriver", "newerdriver", "drivermismatch", "compatnotsupported"): (
        "update the NVIDIA driver, or install ckptdiff[cuda12] for an older one"
    ),
    ("nokernelimage", "nobinaryforgpu", "invalidimage", "invaliddevicefunction", "ptx", "jitcompiler"): (
        "update the NVIDIA driver, which must be as new as NVRTC; or --device cpu"
    ),
    ("nodevice", "invaliddevice"): (
        "--device cpu, or see whether nvidia-smi lists a GPU, and CUDA_VISIBLE_DEVICES allows it"
    ),
    ("deviceunavailable", "devicesunavailable"): (
        "see with nvidia-smi whether another process has the GPU to itself; or --device cpu"
    ),
    ("systemnotready",): "start NVIDIA's fabric manager, which GPUs behind an NVSwitch need; or --device cpu",
    ("launch", "illegal", "misaligned", "invalidpc", "invalidaddressspace", "stackerror", "errorassert"): (
        "run it again, as a process in which this happened cannot use the GPU any more; "
        "if it happens again, --device cpu, and report this"
    ),
    ("nvrtc",): "pip install 'ckptdiff[cuda13]' (or cuda12), which brings NVRTC",
    ("import", "nomodule", "cannotopenshared"): "install CuPy anew, just one of ckptdiff[cuda13] and ckptdiff[cuda12]",
}
"""What helps, by what is found in errors of the runtime, the driver and the compiler, in lower case without _."""


def failure(error: BaseException, device: str) -> DeviceError:
    """What went wrong on a device, and what helps."""
    lines = [line for line in str(error).splitlines() if line.strip(" =")]  # CuPy frames some in lines of =
    known = (hint for signs, hint in _HINTS.items() if _says(error, signs))
    hint = next(known, "--device cpu, and see nvidia-smi and dmesg")
    return DeviceError(f"the GPU failed: {lines[0] if lines else type(error).__name__}", found=device, hint=hint)


def _says(error: BaseException, signs: tuple[str, ...]) -> bool:
    """Whether an error has one of these names: cudaErrorIllegalAddress and CUDA_ERROR_ILLEGAL_ADDRESS are the same."""
    text = str(error).lower().replace("_", "").replace(" ", "")
    return any(sign in text for sign in signs)


class CupyGpu:
    """A GPU through CuPy, by its index; DeviceError if CuPy does not reach it."""

    _modules: ClassVar[dict[tuple[int, Formats], dict[str, Any]]] = {}
    _compiling: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, index: int = 0) -> None:
        import cupy

        self.cupy, self.index = cupy, index
        self.name = f"cuda:{index}"
        self._select()

    @_reported
    def _select(self) -> None:
        self.cupy.cuda.Device(self.index).use()  # for the thread that calls
        self.properties: dict[str, Any] = self.cupy.cuda.runtime.getDeviceProperties(self.index)

    @property
    def processors(self) -> int:
        """Multiprocessors."""
        return int(self.properties["multiProcessorCount"])

    @_reported
    def pinned(self, size: int) -> ByteArray:
        """Page-locked host memory, as much as was asked for: CuPy's pool would take up to twice of it."""
        cuda = self.cupy.cuda
        try:
            memory = cuda.PinnedMemory(size, cuda.runtime.hostAllocPortable)
        except RuntimeError as error:
            if _says(error, _OUT_OF_MEMORY):
                raise MemoryError(f"{size >> 20} MiB of host memory cannot be page-locked") from error
            raise
        return np.frombuffer(cuda.PinnedMemoryPointer(memory, 0), np.uint8, size)

    @_reported
    def empty(self, size: int) -> Buffer:
        """GPU memory."""
        return self.cupy.empty(size, np.uint8)

    @_reported
    def stream(self) -> Stream:
        """A stream that does not wait for the null stream."""
        return self.cupy.cuda.Stream(non_blocking=True)

    @_reported
    def upload(self, target: Buffer, origin: ByteArray, stream: Stream) -> None:
        """Copy from pinned memory."""
        target.data.copy_from_host_async(origin.ctypes.data, origin.nbytes, stream)

    @_reported
    def download(self, target: ByteArray, origin: Buffer, stream: Stream) -> None:
        """Copy into pinned memory."""
        origin.data.copy_to_host_async(target.ctypes.data, target.nbytes, stream)

    @_reported
    def clear(self, target: Buffer, stream: Stream) -> None:
        """Write zeros."""
        target.data.memset_async(0, target.nbytes, stream)

    @_reported
    def launch(self, formats: Formats, kernel: str, blocks: int, args: Sequence[Any], stream: Stream) -> None:
        """Launch a kernel, compiled on first use."""
        threads = 1 if kernel == "place_ties" else THREADS
        self._function(formats, kernel)((blocks,), (threads,), tuple(args), 0, stream)

    @_reported
    def record(self, stream: Stream, event: Event | None = None) -> Event:
        """Record an event that is waited for without spinning."""
        if event is None:
            event = self.cupy.cuda.Event(block=True, disable_timing=True)
        event.record(stream)
        return event

    @_reported
    def wait(self, stream: Stream, event: Event) -> None:
        """Wait on the device."""
        stream.wait_event(event)

    @_reported
    def synchronize(self, event: Event) -> None:
        """Wait on the host; other threads go on."""
        event.synchronize()

    @_reported
    def finish(self, stream: Stream) -> None:
        """Wait on the host for a whole stream."""
        stream.synchronize()

    @_reported
    def free_memory(self) -> tuple[int, int]:
        """Bytes that are free, and bytes there are."""
        free, total = self.cupy.cuda.runtime.memGetInfo()
        return int(free), int(total)

    @_reported
    def release(self) -> None:
        """Give memory back that CuPy keeps for whoever asks next."""
        self.cupy.get_default_memory_pool().free_all_blocks()

    def _function(self, formats: Formats, kernel: str) -> Any:
        key = (self.index, formats)
        if functions := self._modules.get(key):
            return functions[kernel]
        with self._compiling:
            if key not in self._modules:
                architecture = architecture_for(int(self.properties["major"]), int(self.properties["minor"]))
                base, tuned, compare = formats
                module = self.cupy.cuda.Module()
                module.load(compiled_kernels(architecture, (base.name, tuned.name, compare.name)))
                self._modules[key] = {kernel: module.get_function(kernel) for kernel in KERNEL_NAMES}
            return self._modules[key][kernel]
