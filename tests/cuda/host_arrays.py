"""Arrays on the device of the tests: those of array-api-strict, which leave their own only when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import array_api_strict
import numpy as np
from host_gpu import HostGpu, Memory

from ckptdiff.linalg.on_cupy import GpuLibrary


class ArrayGpu(HostGpu):
    """A device whose kernels take arrays too, at once: so those are computed."""

    name = "cuda:0"
    properties: ClassVar[dict[str, int]] = {"major": 9, "minor": 0}

    def launch(self, formats: Any, kernel: str, blocks: int, args: list[Any], stream: Any) -> None:
        arrays = [Memory(value._array) if hasattr(value, "_array") else value for value in args]
        super().launch(formats, kernel, blocks, arrays, stream)
        if any(hasattr(value, "_array") for value in args):
            self.finish(stream)


def library_on(gpu: ArrayGpu, memory: int) -> tuple[GpuLibrary, Callable[[], AbstractContextManager[None]]]:
    """In the place of :func:`ckptdiff.spectra.spectra_gpu.library_on`."""
    stream, device = gpu.stream(), array_api_strict.Device("device1")

    def start_of(buffer: Memory, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
        gpu.finish(stream)
        held = buffer.held[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        return array_api_strict.asarray(held, device=device, copy=False)

    return GpuLibrary(array_api_strict, device, 48, gpu=gpu, stream=stream, array=start_of), nullcontext
