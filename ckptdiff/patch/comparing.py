"""Read both sides of each tensor block by block, in several threads, and make a patch of what is found."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import Checkpoint, TensorInfo
from ckptdiff.checkpoint.open_shards import OpenShards, open_shards
from ckptdiff.errors import PatchError
from ckptdiff.events import Listener, stage
from ckptdiff.files.staged import StagedFile
from ckptdiff.patch.coded_block import Coding
from ckptdiff.patch.delta import BLOCK_CODES
from ckptdiff.patch.spans import Piece, in_pieces, read_block_of, read_whole_tensors, threads_for, work_in_order

__all__ = [
    "Bytes",
    "PairMaking",
    "Shipped",
    "Sides",
    "SmallTensors",
    "blocks_in",
    "codes_in",
    "make_of_pair",
    "partner_of",
    "pieces_of",
    "require_same_tensors",
    "shipped",
    "spooled",
]

Bytes: TypeAlias = NDArray[np.uint8]
Sides: TypeAlias = tuple[Checkpoint, Checkpoint]
Made = TypeVar("Made", covariant=True)
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


@dataclass(frozen=True, slots=True)
class SmallTensors:
    """Tensors of one block each, whose bytes of both sides lie in two arrays, each tensor at the same place."""

    tensors: Sequence[TensorInfo]
    starts: Sequence[int]
    """Where each begins, and where the last one ends."""
    partners: Sequence[TensorInfo | None]
    before: Bytes
    after: Bytes

    def each(self) -> Iterator[tuple[TensorInfo, Bytes | None, Bytes]]:
        """Tensors with their bytes before, if the base has them, and after."""
        for place, (tensor, partner) in enumerate(zip(self.tensors, self.partners, strict=True)):
            start, stop = self.starts[place], self.starts[place + 1]
            yield tensor, None if partner is None else self.before[start:stop], self.after[start:stop]

    def paired(self) -> Iterator[tuple[int, tuple[int, Coding]]]:
        """Places of those that the base has, with how many codes of what kind they have."""
        for place, partner in enumerate(self.partners):
            if partner is not None:
                yield place, (codes_in(partner), Coding.of(partner.dtype))


class PairMaking(Protocol[Made]):
    """A patch on its way to its target, which it gets when it is finished."""

    @property
    def names(self) -> Sequence[str]:
        """The tensors of the tuned side, in the order in which the patch has them."""

    def work(self, tensor: TensorInfo, place: int, before: Any, after: Bytes) -> Any:
        """Make what the patch holds of a block, in one of several threads.

        Its bytes before, of the base's tensor with this name, dtype and shape, if there is one, and after are valid
        until this returns.
        """

    def take(self, tensor: TensorInfo, place: int, found: Any) -> None:
        """Write that; called one block after the other, those of a tensor in their order."""

    def finish(self) -> Made:
        """Complete the patch, and let it take its name."""


@runtime_checkable
class SmallMaking(Protocol):
    """A patch of a format that many small tensors are coded for at once."""

    def work_small(self, small: SmallTensors) -> Sequence[Any]:
        """Make what the patch holds of each, in one of several threads."""


def make_of_pair(
    sides: Sides,
    begin: Callable[[threading.Event, int], AbstractContextManager[PairMaking[Made]]],
    threads: int,
    listener: Listener | None,
) -> Made:
    """Read both sides once, in the order of a patch, and make it.

    Parameters
    ----------
    begin : callable
        Begins the patch, given an event that is set when the run ends early, and how many threads work.
    """
    stop, working = threading.Event(), threads_for(threads)
    total = sum(tensor.nbytes for side in sides for tensor in side.tensors.values())
    with begin(stop, working) as making, stage(listener, "making the patch", total, "bytes") as told:
        base, tuned = sides
        rooms = threading.local()
        with open_shards("pread") as shards:

            def one(name: str, place: int) -> tuple[TensorInfo, int, Any]:
                tensor = tuned.tensors[name]
                coding, partner = Coding.of(tensor.dtype), partner_of(base, tensor)
                first, second = _room(rooms, min(BLOCK_CODES * coding.width, tensor.nbytes))
                after = read_block_of(shards, tensor, coding, place, second)
                before = None if partner is None else read_block_of(shards, partner, coding, place, first)
                return tensor, place, making.work(tensor, place, before, after)

            def some(pieces: Sequence[Piece]) -> list[tuple[TensorInfo, int, Any]]:
                if len(pieces) == 1 or not isinstance(making, SmallMaking):
                    return [one(*piece) for piece in pieces]
                small = _read_small(shards, [tuned.tensors[name] for name, _ in pieces], base, rooms)
                found = making.work_small(small)
                return [(tensor, 0, made) for tensor, made in zip(small.tensors, found, strict=True)]

            codes = ((name, codes_in(tuned.tensors[name])) for name in making.names)
            for results in work_in_order(in_pieces(codes), some, working, stop, told.again):
                read = 0
                for tensor, place, result in results:
                    block = min(BLOCK_CODES * Coding.of(tensor.dtype).width, tensor.nbytes)
                    read += block if partner_of(base, tensor) is None else 2 * block
                    making.take(tensor, place, result)
                told.more(read, results[-1][0].name)
        return making.finish()


def _read_small(
    shards: OpenShards, tensors: Sequence[TensorInfo], base: Checkpoint, rooms: threading.local
) -> SmallTensors:
    """Read tensors of one block each of both sides."""
    starts = [0, *accumulate(tensor.nbytes for tensor in tensors)]
    partners = [partner_of(base, tensor) for tensor in tensors]
    before, after = (room[: starts[-1]] for room in _room(rooms, starts[-1]))
    read_whole_tensors(shards, tensors, starts, after)
    there = [place for place, partner in enumerate(partners) if partner is not None]
    read_whole_tensors(shards, [one for one in partners if one], [starts[place] for place in there], before)
    return SmallTensors(tensors, starts, partners, before, after)


def _room(rooms: threading.local, size: int) -> list[Bytes]:
    """Two buffers of a thread."""
    found: list[Bytes] | None = getattr(rooms, "found", None)
    if found is None or found[0].size < size:
        found = rooms.found = [np.empty(size, np.uint8) for _ in range(2)]
    return found


def partner_of(base: Checkpoint, tensor: TensorInfo) -> TensorInfo | None:
    """What the base has of a tensor's name, if it has it in this dtype and shape."""
    found = base.tensors.get(tensor.name)
    return found if found is not None and (found.dtype, found.shape) == (tensor.dtype, tensor.shape) else None


def require_same_tensors(sides: Sides, format: str) -> None:
    """Refuse sides whose tensors differ in more than their values.

    Raises
    ------
    PatchError
        It names the first tensor that is new, lost, retyped or reshaped.
    """
    base, tuned = sides
    for name in [*tuned.tensors, *base.tensors]:
        kinds = [
            f"{side.tensors[name].dtype} {list(side.tensors[name].shape)}" if name in side.tensors else "no such tensor"
            for side in sides
        ]
        if kinds[0] != kinds[1]:
            raise PatchError(
                f"{format} can only say how values change",
                file=tuned.path,
                tensor=name,
                expected=f"{kinds[0]}, as in {base.path}",
                found=kinds[1],
                hint="ckptdiff's own format keeps such a tensor whole",
            )


def codes_in(tensor: TensorInfo) -> int:
    """Codes of a tensor."""
    return tensor.nbytes // Coding.of(tensor.dtype).width


def blocks_in(tensor: TensorInfo) -> int:
    """Blocks that a tensor is read in; an empty one is read once."""
    return max(-(-codes_in(tensor) // BLOCK_CODES), 1)


def pieces_of(spool: StagedFile, start: int, size: int) -> Iterator[bytes]:
    """Read back what was written into a file that is not to take its name."""
    for at in range(start, start + size, _COPIED):
        spool.seek(at)
        yield spool.read(min(_COPIED, start + size - at))


def spooled(spool: StagedFile, start: int, size: int) -> Callable[[], Iterator[bytes]]:
    """The same, to be begun later."""
    return lambda: pieces_of(spool, start, size)


def shipped(sides: Sides, changed_tensors: int, changed: int, changed_bytes: int, files: int, size: int) -> Shipped:
    """What was written, beside the sizes of the tuned side."""
    tensors = sides[1].tensors.values()
    return Shipped(
        tensors=len(tensors),
        changed_tensors=changed_tensors,
        values=sum(map(codes_in, tensors)),
        changed=changed,
        dense=sum(one.nbytes for one in tensors),
        changed_bytes=changed_bytes,
        files=files,
        size=size,
        warnings=tuple(warning for side in sides for warning in side.warnings),
    )
