"""What the CUDA backend asks of CuPy, by a CuPy that notes it down; a real one has all of these (test_compile.py)."""

import inspect
import sys
import types

import numpy as np
import pytest

from ckptdiff.errors import DeviceError
from ckptdiff.formats import FORMATS
from ckptdiff.measure.cuda import gpu as gpu_module
from ckptdiff.measure.cuda.compiled import THREADS
from ckptdiff.measure.cuda.gpu import CupyGpu

BF16 = (FORMATS["bf16"],) * 3
F16 = (FORMATS["f16"],) * 3


class RuntimeOfCuda:
    hostAllocPortable = 1  # noqa: N815
    properties = {"multiProcessorCount": 132, "major": 9, "minor": 0}  # noqa: RUF012

    def getDeviceProperties(self, index):  # noqa: N802
        return self.properties


class FakeCupy(types.ModuleType):
    """Notes what is called, in order; raises ``errors[what]`` instead."""

    def __init__(self):
        super().__init__("cupy")
        self.calls, self.errors = [], {}
        self.cuda = types.SimpleNamespace(
            runtime=RuntimeOfCuda(),
            Device=lambda index: types.SimpleNamespace(use=lambda: self.note("use", index)),
            PinnedMemory=lambda size, flags: self.note("PinnedMemory", size, flags) or bytearray(size),
            PinnedMemoryPointer=lambda memory, offset: memoryview(memory)[offset:],
            Module=lambda: types.SimpleNamespace(
                load=lambda code: self.note("load", code),
                get_function=lambda name: lambda *args: self.note(f"launch {name}", *args),
            ),
        )

    def note(self, what, *args):
        self.calls.append((what, *args))
        if what in self.errors:
            raise self.errors[what]


@pytest.fixture
def cupy(monkeypatch):
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(CupyGpu, "_modules", {})
    monkeypatch.setattr(gpu_module, "architecture_for", lambda major, minor: f"sm_{major}{minor}")
    monkeypatch.setattr(
        gpu_module, "compiled_kernels", lambda architecture, names: f"{architecture} {'-'.join(names)}".encode()
    )
    return fake


def test_kernels_are_loaded_once_and_launched_on_the_stream_they_are_given(cupy):
    gpu, stream = CupyGpu(1), object()
    assert cupy.calls == [("use", 1)]
    arguments = [np.uint32(3), None]
    for formats, kernel in ((BF16, "scan"), (BF16, "place_ties"), (F16, "harvest"), (BF16, "refine")):
        gpu.launch(formats, kernel, 7, arguments, stream)
    given = tuple(arguments)
    assert cupy.calls[1:] == [
        ("load", b"sm_90 bf16-bf16-bf16"),
        ("launch scan", (7,), (THREADS,), given, 0, stream),
        ("launch place_ties", (7,), (1,), given, 0, stream),
        ("load", b"sm_90 f16-f16-f16"),
        ("launch harvest", (7,), (THREADS,), given, 0, stream),
        ("launch refine", (7,), (THREADS,), given, 0, stream),
    ]


def test_each_gpu_loads_its_own_kernels(cupy):
    for index in (0, 1, 0):
        CupyGpu(index).launch(BF16, "scan", 1, [], None)
    assert [call[0] for call in cupy.calls].count("load") == 2


def test_page_locked_memory_is_as_much_as_was_asked_for(cupy):
    host = CupyGpu().pinned(12_345)
    assert (host.dtype, host.shape) == (np.uint8, (12_345,))
    host[:] = 1
    assert cupy.calls[1:] == [("PinnedMemory", 12_345, 1)]


def test_memory_that_cannot_be_page_locked_is_a_memory_error(cupy):
    gpu = CupyGpu()
    cupy.errors["PinnedMemory"] = RuntimeError("cudaErrorMemoryAllocation: out of memory")
    with pytest.raises(MemoryError, match="5 MiB of host memory cannot be page-locked"):
        gpu.pinned(5 << 20)
    cupy.errors["PinnedMemory"] = RuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered")
    with pytest.raises(DeviceError, match="IllegalAddress"):
        gpu.pinned(5 << 20)


def test_an_event_is_used_again(cupy):
    made = []

    class Event:
        def __init__(self, **how):
            assert how == {"block": True, "disable_timing": True}  # who waits for it leaves the processor to others
            made.append(self)

        def record(self, stream):
            cupy.note("record", stream)

    cupy.cuda.Event = Event
    gpu, stream = CupyGpu(), object()
    first = gpu.record(stream)
    assert gpu.record(stream, first) is first and gpu.record(stream) is not first
    assert len(made) == 2 and cupy.calls[1:] == [("record", stream)] * 3


def test_memory_that_cupy_keeps_is_given_back(cupy):
    pool = types.SimpleNamespace(free_all_blocks=lambda: cupy.note("free"))
    cupy.get_default_memory_pool = lambda: pool
    CupyGpu().release()
    assert cupy.calls[1:] == [("free",)]


@pytest.mark.parametrize("what", ["load", "launch scan"])
def test_memory_that_runs_out_in_mid_run_is_an_error_that_says_what_to_do(cupy, what):
    cupy.errors[what] = RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory")
    with pytest.raises(DeviceError, match="CUDA_ERROR_OUT_OF_MEMORY") as caught:
        CupyGpu().launch(BF16, "scan", 1, [], None)
    assert "--gpu-memory" in caught.value.hint
    assert caught.value.found == "cuda:0"


def test_a_gpu_lost_in_mid_run_ends_in_an_error(cupy):
    def synchronize():
        raise RuntimeError("cudaErrorDevicesUnavailable: GPU has fallen off the bus")

    lost = types.SimpleNamespace(synchronize=synchronize)
    for wait in (CupyGpu().synchronize, CupyGpu().finish):
        with pytest.raises(DeviceError, match="fallen off the bus"):
            wait(lost)


@pytest.mark.nvrtc
def test_cupy_has_what_the_backend_calls():
    cupy = pytest.importorskip("cupy", reason="CuPy is missing")
    cuda = cupy.cuda
    called = {
        cupy: ("empty", "get_default_memory_pool", "uint8"),
        cuda: ("Device", "Event", "MemoryPointer", "Module", "PinnedMemory", "PinnedMemoryPointer", "Stream"),
        cuda.MemoryPointer: ("copy_from_host_async", "copy_to_host_async", "memset_async"),
        cuda.Stream: ("wait_event", "synchronize"),
        cuda.Event: ("record", "synchronize"),
        cuda.Device: ("use",),
        cuda.Module: ("load", "get_function"),
        cuda.runtime: ("getDeviceCount", "getDeviceProperties", "memGetInfo", "driverGetVersion", "hostAllocPortable"),
    }
    for owner, names in called.items():
        assert [name for name in names if not hasattr(owner, name)] == [], owner
    assert cuda.runtime.hostAllocPortable == RuntimeOfCuda.hostAllocPortable
    assert list(inspect.signature(cuda.PinnedMemory).parameters) == ["size", "flags"]


@pytest.mark.nvrtc
def test_a_block_of_cupy_is_an_array_without_a_copy():
    cupy = pytest.importorskip("cupy", reason="CuPy is missing")
    memory = np.zeros(100, np.uint8)
    block = types.SimpleNamespace(ptr=memory.ctypes.data, size=memory.size)  # in the place of a PinnedMemory
    array = np.frombuffer(cupy.cuda.PinnedMemoryPointer(block, 0), np.uint8, memory.size)
    array[40:] = 7
    assert memory.tolist() == [0] * 40 + [7] * 60
