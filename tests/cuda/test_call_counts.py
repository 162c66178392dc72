"""How much a GB of both sides costs in calls: into CuPy, and of Python altogether, all under the interpreter's lock.

A bus of PCIe 5 brings 50 GB/s, or a GB in 20 ms. Threads take turns with whatever holds the lock, so what that takes
bounds all of them together: 350 calls into CuPy are 1 ms at some 3 us each, and 12,000 of Python 8 ms at some 0.7 us.
"""

import ctypes
import sys
import types

import numpy as np
import pytest

from ckptdiff.formats import FORMATS
from ckptdiff.measure.cuda import gpu as gpu_module
from ckptdiff.measure.cuda.backend import CudaBackend
from ckptdiff.measure.cuda.gpu import CupyGpu
from ckptdiff.measure.cuda.layout import BIN, ROWS
from ckptdiff.measure.cuda.slots import Room
from ckptdiff.measure.partial import BINS, BLOCK, Partial, Rule, Scan
from ckptdiff.measure.source import InMemory
from ckptdiff.measure.thresholds import EPS
from ckptdiff.options import MaskRule
from ckptdiff.run.tasks import Span
from ckptdiff.run.worker import _compressed
from ckptdiff.runfile.writer import RunFileWriter

CUPY_CALLS = 350
PYTHON_CALLS = 12_000
"""For each GB of both sides, at most."""
USED = 6000
"""Bins that a span leaves: those of bfloat16 weights around 0.02, and of their changes."""


def nothing(*args, **how):
    pass


def harvest(blocks, threads, args, shared, stream):
    """What a launch leaves: the bins that are in use."""
    _, size, used, found = args
    assert size == ROWS * BINS
    bins = np.array([0, 1, 3])[:, None] * BINS + np.arange(USED // 3) + 14_000
    used.held.view(BIN)[:USED] = np.rec.fromarrays([bins.reshape(-1), np.ones(USED)], BIN)
    found.held.view(np.uint32)[0] = USED


class Cupy(types.ModuleType):
    """CuPy as far as the pipeline asks for it, without a device: every call, and every part of an array, is counted."""

    def __init__(self):
        super().__init__("cupy")
        self.calls = {}
        runtime = types.SimpleNamespace(
            hostAllocPortable=1,
            getDeviceProperties=lambda index: {"multiProcessorCount": 132, "major": 9, "minor": 0},
        )
        self.cuda = types.SimpleNamespace(
            runtime=runtime,
            Device=lambda index: types.SimpleNamespace(use=lambda: None),
            PinnedMemory=lambda size, flags: bytearray(size),
            PinnedMemoryPointer=lambda memory, offset: memory,
            Module=lambda: types.SimpleNamespace(load=nothing, get_function=self.function),
            Stream=lambda non_blocking: types.SimpleNamespace(
                wait_event=Counted(self, "wait_event"), synchronize=Counted(self, "synchronize")
            ),
            Event=Counted(
                self,
                "Event",
                lambda **how: types.SimpleNamespace(
                    record=Counted(self, "record"), synchronize=Counted(self, "synchronize")
                ),
            ),
        )

    def function(self, name):
        return Counted(self, f"launch {name}", harvest if name == "harvest" else nothing)

    def empty(self, size, dtype):
        return Held(self, np.zeros(size, dtype))


class Counted:
    """A function of it."""

    def __init__(self, cupy, name, act=nothing):
        self._cupy, self._name, self._act = cupy, name, act

    def __call__(self, *args, **how):
        self._cupy.calls[self._name] = self._cupy.calls.get(self._name, 0) + 1
        return self._act(*args, **how)


class Held:
    """An array of it, which is its own pointer."""

    def __init__(self, cupy, held):
        self._cupy, self.held = cupy, held
        self.nbytes, self.data = held.nbytes, self
        self.copy_from_host_async = Counted(cupy, "copy up")  # nobody looks at what would come there
        self.memset_async = Counted(cupy, "memset")
        self.copy_to_host_async = Counted(cupy, "copy down", self._down)

    def __getitem__(self, part):
        return Counted(self._cupy, "slice", lambda: Held(self._cupy, self.held[part]))()

    def _down(self, address, size, stream):
        ctypes.memmove(address, self.held.ctypes.data, size)


@pytest.fixture
def cupy(monkeypatch):
    fake = Cupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(CupyGpu, "_modules", {})
    monkeypatch.setattr(gpu_module, "architecture_for", lambda major, minor: "sm_90")
    monkeypatch.setattr(gpu_module, "compiled_kernels", lambda architecture, names: b"")
    return fake


@pytest.fixture
def task(cupy):
    """A backend, and what a task of its size hands it."""
    bf16, room = FORMATS["bf16"], Room()
    numel = room.task_blocks * BLOCK
    scan = Scan(bf16, bf16, bf16, EPS, 1e-3, Rule.ABOVE, 1e-5, want_mask=True)
    side = np.zeros(2 * numel, np.uint8)
    backend, partial = CudaBackend(CupyGpu(), room), Partial()
    backend.scan(scan, InMemory(side, side, numel), partial)  # kernels, events, settings and tiles are made
    partial.clear()
    cupy.calls.clear()
    return backend, scan, InMemory(side, side, numel), partial


def test_calls_into_cupy(cupy, task):
    backend, scan, source, partial = task
    backend.scan(scan, source, partial)
    assert partial.weights.sum() == 2 * USED // 3  # the figures of this span came down
    gigabytes = 4 * source.numel / 1e9
    assert sum(cupy.calls.values()) / gigabytes < CUPY_CALLS, cupy.calls
    # Four launches, each with one copy up, one kernel, one copy down; the last one brings all figures too.
    assert (cupy.calls["copy up"], cupy.calls["launch scan"], cupy.calls["copy down"]) == (4, 4, 5)
    assert cupy.calls["synchronize"] == 4 and "Event" not in cupy.calls


def test_calls_of_python(cupy, task, tmp_path):
    """Of all that is done for a span: the scan, its merging, and its mask, which is compressed and written."""
    backend, scan, source, partial = task
    blocks, shape, counted = source.numel // BLOCK, (4 * source.numel,), [0]
    pair = types.SimpleNamespace(shape=shape, base=types.SimpleNamespace(numel=shape[0]))
    writer = RunFileWriter(tmp_path / "run.h5", rule=MaskRule("abs", 1e-5), compare="bf16")
    merged = Partial()

    def span(first):
        mask = backend.scan(scan, source, partial)
        merged.add(partial)
        partial.clear()
        made = _compressed(mask, Span(0, first, first + blocks), pair)
        writer.add_mask_chunks("w", shape, made.first, made.chunks)
        return made

    def count(frame, event, argument):
        counted[0] += event in ("call", "c_call")

    class LeftUnfinishedError(Exception):
        pass

    with pytest.raises(LeftUnfinishedError), writer:
        span(0)
        sys.setprofile(count)
        try:
            made = span(blocks)
        finally:
            sys.setprofile(None)
        raise LeftUnfinishedError
    assert len(made.chunks) == blocks
    assert counted[0] / (4 * source.numel / 1e9) < PYTHON_CALLS
