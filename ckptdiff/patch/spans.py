"""Cut tensors into what one thread takes at a time: a block of a large one, or many small ones."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import DTYPES, TensorInfo
from ckptdiff.checkpoint.boxes import read_elements
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.events import Listener, ignore
from ckptdiff.in_order import Task, in_order
from ckptdiff.patch.coded_block import Coding
from ckptdiff.patch.delta import BLOCK_CODES
from ckptdiff.run.warm_up import Uses, load

__all__ = ["Piece", "in_pieces", "load_kernels", "read_block_of", "read_whole_tensors", "threads_for", "work_in_order"]

Given = TypeVar("Given")
Key = TypeVar("Key")
Result = TypeVar("Result")
Piece = tuple[str, int]
"""A tensor and which of its blocks."""
_MOST_TENSORS = 256
"""Small tensors that are taken at a time."""


def in_pieces(tensors: Iterable[tuple[Key, int]], most: int = _MOST_TENSORS) -> Iterator[list[tuple[Key, int]]]:
    """Blocks in the order of their tensors, given with how many codes each has; small tensors together.

    Yields
    ------
    list of (name, int)
        What one thread takes. A tensor without codes has one block, which is empty.
    """
    small: list[tuple[Key, int]] = []
    held = 0
    for name, codes in tensors:
        if small and (held + codes > BLOCK_CODES or len(small) == most):
            yield small
            small, held = [], 0
        if codes > BLOCK_CODES:
            for place in range(-(-codes // BLOCK_CODES)):
                yield [(name, place)]
        else:
            small.append((name, 0))
            held += codes
    if small:
        yield small


def load_kernels(listener: Listener | None, use: str = "delta") -> None:
    """Load the kernels of this package, or others, or have them compiled, which the listener is told of."""
    load(None, Uses(((use,),)), listener or ignore)


def threads_for(asked: int) -> int:
    """How many threads work, given what was asked for; 0 stands for one per core."""
    return asked or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else asked or os.cpu_count() or 1


def work_in_order(
    given: Iterable[Given],
    work: Callable[[Given], Result],
    threads: int,
    stop: threading.Event,
    idle: Callable[[], None],
) -> Iterator[Result]:
    """Do the work on all that is given in several threads, and give back its results in their order."""
    tasks = (Task(lambda some=some: work(some), 1, 1) for some in given)  # type: ignore[misc]
    return in_order(tasks, threads, stop.set, idle, ahead=2)


def read_block_of(
    shards: OpenShards, tensor: TensorInfo, coding: Coding, place: int, buffer: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Read the stored bytes of one block of a tensor into a buffer; returns them, read-only."""
    first = place * BLOCK_CODES * coding.width
    stop = min(first + BLOCK_CODES * coding.width, tensor.nbytes)
    data = buffer[: stop - first]
    if tensor.slices:
        bits = DTYPES[tensor.dtype].bits
        read_elements(shards, tensor, 8 * first // bits, 8 * stop // bits, data)
    else:
        _read_run(shards, tensor, tensor.start + first, tensor.start + stop, data)
    data = data.view()
    data.flags.writeable = False
    return data


def read_whole_tensors(shards: OpenShards, tensors: Iterable[tuple[TensorInfo, int]], out: NDArray[np.uint8]) -> None:
    """Read small tensors, each to its place; those that lie one behind the other in a file are read at once."""
    runs: list[list[tuple[TensorInfo, int]]] = []
    shard, stop, end = None, 0, 0
    for tensor, start in tensors:
        if tensor.slices:
            count = 8 * tensor.nbytes // DTYPES[tensor.dtype].bits
            read_elements(shards, tensor, 0, count, out[start : start + tensor.nbytes])
            continue
        if tensor.shard is not shard or tensor.start != stop or start != end:
            runs.append([])
        runs[-1].append((tensor, start))
        shard, stop, end = tensor.shard, tensor.stop, start + tensor.stop - tensor.start
    for run in runs:
        (first, place), (last, _) = run[0], run[-1]
        _read_run(shards, first, first.start, last.stop, out[place : place + last.stop - first.start])


def _read_run(shards: OpenShards, tensor: TensorInfo, start: int, stop: int, out: NDArray[np.uint8]) -> None:
    with shards[tensor.shard].window(tensor, start, stop, out) as found:
        if tensor.shard.remote is not None:
            out[:] = found
