"""Hash what a checkpoint holds, whatever files it lies in: XXH3-128 of each tensor, and of all of them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

import numpy as np

from ckptdiff.checkpoint.header import TensorInfo
from ckptdiff.checkpoint.open_shards import OpenShards, open_shards
from ckptdiff.errors import required
from ckptdiff.events import Listener, stage
from ckptdiff.in_order import Task, in_order

__all__ = ["content_hashes", "hash_of_all", "require_xxhash"]

_THREADS = 2
_PIECE = 8 << 20
"""Bytes that a thread reads at a time."""


def require_xxhash() -> Any:
    """The module xxhash; raises an OptionError if it is missing."""
    return required("xxhash", "hashes need", "patch")


def content_hashes(
    tensors: Iterable[TensorInfo], *, piece: int = _PIECE, listener: Listener | None = None
) -> dict[str, str]:
    """Hash each tensor, read once by two threads in pieces.

    A hash is XXH3-128 with seed 0 over the name in UTF-8, the dtype as the header spells it, and the dimensions in
    decimal with commas between them, each followed by a zero byte, and then over the bytes as they are stored.

    Parameters
    ----------
    tensors : iterable of TensorInfo
    piece : int
        Bytes that each thread holds at a time, at most.
    listener : callable, optional
        Told of the stage "hashing".

    Returns
    -------
    dict of str to str
        32 hexadecimal digits by name.

    Raises
    ------
    OptionError
        xxhash is not installed.
    CheckpointError
        A file cannot be read, or changes.
    """
    require_xxhash()
    chosen, stop, lock, done = list(tensors), threading.Event(), threading.Lock(), 0

    def hashed(tensor: TensorInfo, shards: OpenShards) -> str:
        nonlocal done
        digest = _begun(tensor)
        for count in _updates(digest, tensor, shards, piece):
            with lock:
                done += count
            if stop.is_set():
                raise CancelledError
        return str(digest.hexdigest())

    found: dict[str, str] = {}
    with (
        stage(listener, "hashing", sum(tensor.nbytes for tensor in chosen), "bytes") as told,
        open_shards("pread") as shards,
    ):
        tasks = (Task(partial(hashed, tensor, shards), 1, tensor.nbytes) for tensor in chosen)
        results = in_order(tasks, _THREADS, stop.set, lambda: told.at(done))
        for tensor, digest in zip(chosen, results, strict=True):
            found[tensor.name] = digest
            told.at(done, tensor.name)
    return found


def hash_of_all(hashes: Iterable[str]) -> str:
    """Hash a checkpoint: XXH3-128 over the hashes of its tensors, 16 bytes each, in ascending order."""
    return str(require_xxhash().xxh3_128_hexdigest(b"".join(sorted(map(bytes.fromhex, hashes)))))


def _begun(tensor: TensorInfo) -> Any:
    head = (tensor.name, tensor.dtype, ",".join(map(str, tensor.shape)))
    return require_xxhash().xxh3_128(b"".join(part.encode() + b"\0" for part in head))


def _updates(digest: Any, tensor: TensorInfo, shards: OpenShards, piece: int) -> Iterator[int]:
    """Add the bytes of a tensor, and yield how many each time."""
    buffer = np.empty(min(piece, tensor.nbytes), np.uint8)
    reader = shards[tensor.shard]
    for start in range(tensor.start, tensor.stop, piece):
        end = min(start + piece, tensor.stop)
        with reader.window(tensor, start, end, buffer) as view:
            digest.update(view)
        yield end - start
