"""A device that runs the shipped kernels on the CPU, late, and in any order that streams and events allow."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from host_kernels import Library

Stream = list[Any]


class Memory:
    """GPU memory: bytes that only kernels and copies may touch."""

    def __init__(self, held: np.ndarray) -> None:
        self.held = held

    def __getitem__(self, part: slice) -> Memory:
        return Memory(self.held[part])


class Event:
    """What was recorded last; nothing yet."""

    happened: list[bool]


class HostGpu:
    """What is queued runs when somebody waits for it, chosen by a seed: a missing wait gives wrong bytes.

    Parameters
    ----------
    libraries : callable
        Gives the kernels of a triple of formats.
    seed : int
    processors : int
    memory, lockable : int
        Bytes that may be allocated, and bytes of host memory that may be page-locked.
    """

    _kernels_run = threading.Lock()

    def __init__(
        self,
        libraries: Callable[..., Library],
        seed: int = 0,
        processors: int = 2,
        memory: int = 1 << 40,
        lockable: int = 1 << 40,
    ):
        self._libraries, self._random, self._free = libraries, random.Random(seed), memory
        self._lockable = lockable
        self._noise = np.random.default_rng(seed)
        self.processors = processors
        self._streams: list[Stream] = []
        self.launched: list[str] = []
        self.locked: list[int] = []

    def pinned(self, size: int) -> np.ndarray:
        if size > self._lockable:
            raise MemoryError("not so much can be page-locked")
        self.locked.append(size)
        return self._bytes(size)

    def empty(self, size: int) -> Memory:
        if self._free < size:
            raise MemoryError
        memory = Memory(self._bytes(-(-size // 64) * 64)[:size])
        self._account(-size)
        weakref.finalize(memory, self._account, size)
        return memory

    def _bytes(self, size: int) -> np.ndarray:
        return np.resize(np.frombuffer(self._noise.bytes(min(size, 1_000_003)), np.uint8), size)

    def _account(self, size: int) -> None:
        self._free += size

    def stream(self) -> Stream:
        self._streams.append([])
        return self._streams[-1]

    def upload(self, target: Memory, origin: np.ndarray, stream: Stream) -> None:
        stream.append(lambda: np.copyto(target.held[: origin.size], origin))

    def download(self, target: np.ndarray, origin: Memory, stream: Stream) -> None:
        stream.append(lambda: np.copyto(target, origin.held[: target.size]))

    def clear(self, target: Memory, stream: Stream) -> None:
        stream.append(lambda: target.held.fill(0))

    def launch(self, formats: Any, kernel: str, blocks: int, args: list[Any], stream: Stream) -> None:
        library = self._libraries(*(format.name for format in formats))
        given = [[value.held] if isinstance(value, Memory) else _copied(value) for value in args]
        seed, threads = self._random.randrange(1 << 31), 1 if kernel == "place_ties" else None

        def run() -> None:
            with self._kernels_run:
                library.launch(kernel, blocks, given, seed, threads)

        self.launched.append(kernel)
        stream.append(run)

    def record(self, stream: Stream, event: Event | None = None) -> Event:
        event = event or Event()
        event.happened = happened = [False]
        stream.append(lambda: happened.__setitem__(0, True))
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        stream.append(event.happened)  # and not what is recorded into it later

    def synchronize(self, event: Event) -> None:
        happened = event.happened
        self._work_until(lambda: happened[0])

    def finish(self, stream: Stream) -> None:
        self._work_until(lambda: not stream)

    @property
    def queued(self) -> int:
        """How much was queued and did not run."""
        return sum(map(len, self._streams))

    def _work_until(self, done: Callable[[], bool]) -> None:
        while not done():
            ready = [queue for queue in self._streams if queue and (callable(queue[0]) or queue[0][0])]
            assert ready, "every stream waits for another"
            action = self._random.choice(ready).pop(0)
            if callable(action):
                action()

    def release(self) -> None:
        """Nothing is kept."""

    def free_memory(self) -> tuple[int, int]:
        return self._free, self._free


def _copied(value: Any) -> Any:
    assert value is None or np.size(value) == 1, "more than one element by value"
    return None if value is None else np.array(value)
