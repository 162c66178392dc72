"""What the pipeline asks of a GPU, and CuPy's answer to it.

The tests answer with a device of their own, which runs the same kernels on the CPU in any order that streams and events
allow. So nothing here knows what is computed.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, cast

import numpy as np

from ckptdiff.backends.cuda.source import kernel_options, kernel_source
from ckptdiff.backends.formats import Formats
from ckptdiff.backends.source import ByteArray
from ckptdiff.errors import CkptdiffError, DeviceError

__all__ = ["THREADS", "CupyGpu", "Gpu"]

THREADS = 512
"""Threads of a block, as the kernels are compiled."""

KERNEL_NAMES = ("scan", "refine", "harvest", "place_ties", "take_ties")

Buffer = Any
"""Bytes in GPU memory. Slicing gives a part of it."""
Stream = Any
Event = Any


class Gpu(Protocol):
    """Queues work. All methods return at once but ``synchronize`` and those that allocate."""

    @property
    def processors(self) -> int:
        """Multiprocessors."""

    def pinned(self, size: int) -> ByteArray:
        """Host memory that copies can use without waiting."""

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

    def record(self, stream: Stream) -> Event:
        """What happens once all that is queued so far is done."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Let what is queued from now on wait for an event of another stream."""

    def synchronize(self, event: Event) -> None:
        """Wait until it has happened."""


Method = TypeVar("Method", bound=Callable[..., Any])


def _reported(method: Method) -> Method:
    """Turn what CuPy raises into an error that says what to do; too little memory stays MemoryError."""

    @functools.wraps(method)
    def call(self: CupyGpu, *args: Any) -> Any:
        try:
            return method(self, *args)
        except (MemoryError, CkptdiffError):
            raise
        except (RuntimeError, ImportError, OSError, self.cupy.cuda.compiler.CompileException) as error:
            raise failure(error, self.name) from error

    return cast(Method, call)


def failure(error: BaseException, device: str) -> DeviceError:
    """What went wrong on a device, and what helps."""
    text = str(error)
    hints = {
        "cudaErrorInsufficientDriver": "update the NVIDIA driver, or install ckptdiff[cuda12] for an older one",
        "cudaErrorNoDevice": "--device cpu, or see whether nvidia-smi lists a GPU",
        "cudaErrorMemoryAllocation": "close what else uses the GPU, or --gpu-memory with a smaller size",
        "nvrtc": "pip install 'ckptdiff[cuda13]' (or cuda12), which brings NVRTC",
    }
    hint = next((hint for sign, hint in hints.items() if sign in text), "--device cpu, and see nvidia-smi and dmesg")
    reason = text.splitlines()[0] if text else type(error).__name__
    return DeviceError(f"the GPU failed: {reason}", found=device, hint=hint)


class CupyGpu:
    """A GPU through CuPy.

    Parameters
    ----------
    index : int
        Which one.

    Raises
    ------
    DeviceError
        If CuPy does not reach it.
    """

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
        """Page-locked host memory."""
        return np.frombuffer(self.cupy.cuda.alloc_pinned_memory(size), np.uint8, size)

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
        function = self._function(formats, kernel)
        with stream:
            function((blocks,), (threads,), tuple(args))

    @_reported
    def record(self, stream: Stream) -> Event:
        """Record an event that is waited for without spinning."""
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
    def free_memory(self) -> tuple[int, int]:
        """Bytes that are free, and bytes there are."""
        free, total = self.cupy.cuda.runtime.memGetInfo()
        return int(free), int(total)

    def _function(self, formats: Formats, kernel: str) -> Any:
        key = (self.index, formats)
        with self._compiling:
            if key not in self._modules:
                options = (*kernel_options(*formats), f"-DTHREADS={THREADS}")
                module = self.cupy.RawModule(code=kernel_source(), options=options)
                self._modules[key] = {kernel: module.get_function(kernel) for kernel in KERNEL_NAMES}
            return self._modules[key][kernel]
