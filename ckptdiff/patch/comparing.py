"""Read both sides of the same tensors block by block, in several threads, for the formats of serving engines."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import Checkpoint, TensorInfo
from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.errors import PatchError
from ckptdiff.events import Stage
from ckptdiff.files.staged import StagedFile
from ckptdiff.patch.coded_block import Coding
from ckptdiff.patch.delta import BLOCK_CODES
from ckptdiff.patch.spans import Piece, in_pieces, read_block_of, work_in_order

__all__ = ["Bytes", "Shipped", "blocks_in", "compared", "pieces_of", "require_same_tensors", "shipped", "spooled"]

Bytes = NDArray[np.uint8]
Result = TypeVar("Result")
_COPIED = 4 << 20
"""Bytes that are copied at a time."""


@dataclass(frozen=True, slots=True)
class Shipped:
    """A patch that was written in a format of serving engines.

    Attributes
    ----------
    tensors, changed_tensors : int
    values, changed : int
        Codes of the tuned side, and how many of them differ from the base's.
    dense, changed_bytes : int
        The same in bytes.
    files, size : int
        Of the patch; its bytes.
    warnings : tuple of str
    """

    tensors: int
    changed_tensors: int
    values: int
    changed: int
    dense: int
    changed_bytes: int
    files: int
    size: int
    warnings: tuple[str, ...]


def require_same_tensors(base: Checkpoint, tuned: Checkpoint, format: str) -> None:
    """Refuse sides whose tensors differ in more than their values.

    Raises
    ------
    PatchError
        It names the first tensor that is new, lost, retyped or reshaped.
    """
    for name in [*tuned.tensors, *base.tensors]:
        kinds = [
            f"{side.tensors[name].dtype} {list(side.tensors[name].shape)}" if name in side.tensors else "no such tensor"
            for side in (base, tuned)
        ]
        if kinds[0] != kinds[1]:
            raise PatchError(
                f"{format} can only say how values change",
                file=tuned.path,
                tensor=name,
                expected=f"{kinds[0]}, as in {base.path}",
                found=kinds[1],
                hint="without --format, ckptdiff patch make keeps such a tensor whole",
            )


def blocks_in(tensor: TensorInfo) -> int:
    """Blocks that a tensor is read in; an empty one is read once."""
    return max(-(-tensor.nbytes // (BLOCK_CODES * Coding.of(tensor.dtype).width)), 1)


def compared(
    sides: tuple[Checkpoint, Checkpoint],
    names: Sequence[str],
    work: Callable[[TensorInfo, int, Bytes, Bytes], Result],
    threads: int,
    stop: threading.Event,
    told: Stage,
) -> Iterator[tuple[TensorInfo, int, Result]]:
    """Hand each block of tensors, before and after, to one of several threads.

    Parameters
    ----------
    work : callable
        Takes a tensor, which of its blocks it is, and the bytes of both sides, valid until it returns.
    stop : threading.Event
        Set when the run ends early.

    Yields
    ------
    TensorInfo, int, object
        A tensor of the tuned side, which of its blocks, and what `work` made of it, in the order of names and blocks.
    """
    base, tuned = sides
    rooms = threading.local()

    def room(size: int) -> list[Bytes]:
        found: list[Bytes] | None = getattr(rooms, "found", None)
        if found is None or found[0].size < size:
            found = rooms.found = [np.empty(size, np.uint8) for _ in range(2)]
        return found

    with open_shards("pread") as shards:

        def some(pieces: Sequence[Piece]) -> list[tuple[TensorInfo, int, Result]]:
            found = []
            for name, place in pieces:
                tensor = tuned.tensors[name]
                coding = Coding.of(tensor.dtype)
                first, second = room(min(BLOCK_CODES * coding.width, tensor.nbytes))
                before = read_block_of(shards, base.tensors[name], coding, place, first)
                after = read_block_of(shards, tensor, coding, place, second)
                found.append((tensor, place, work(tensor, place, before, after)))
            return found

        codes = ((name, tuned.tensors[name].nbytes // Coding.of(tuned.tensors[name].dtype).width) for name in names)
        for results in work_in_order(in_pieces(codes), some, threads, stop, told.again):
            for tensor, place, result in results:
                told.more(2 * min(BLOCK_CODES * Coding.of(tensor.dtype).width, tensor.nbytes), tensor.name)
                yield tensor, place, result


def pieces_of(spool: StagedFile, start: int, size: int) -> Iterator[bytes]:
    """Read back what was written into a file that is not to take its name."""
    for at in range(start, start + size, _COPIED):
        spool.seek(at)
        yield spool.read(min(_COPIED, start + size - at))


def spooled(spool: StagedFile, start: int, size: int) -> Callable[[], Iterator[bytes]]:
    """The same, to be begun later."""
    return lambda: pieces_of(spool, start, size)


def shipped(
    sides: tuple[Checkpoint, Checkpoint], changed_tensors: int, changed: int, changed_bytes: int, files: int, size: int
) -> Shipped:
    """What was written, beside the sizes of the tuned side."""
    tensors = sides[1].tensors.values()
    return Shipped(
        tensors=len(tensors),
        changed_tensors=changed_tensors,
        values=sum(one.nbytes // Coding.of(one.dtype).width for one in tensors),
        changed=changed,
        dense=sum(one.nbytes for one in tensors),
        changed_bytes=changed_bytes,
        files=files,
        size=size,
        warnings=tuple(warning for side in sides for warning in side.warnings),
    )
