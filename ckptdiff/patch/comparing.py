"""Read both sides of each tensor block by block, in several threads, and make a patch of what is found."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import Checkpoint, TensorInfo
from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.errors import PatchError
from ckptdiff.events import Listener, stage
from ckptdiff.files.staged import StagedFile
from ckptdiff.patch.coded_block import Coding
from ckptdiff.patch.delta import BLOCK_CODES, extent_of
from ckptdiff.patch.spans import (
    Piece,
    in_pieces,
    load_kernels,
    read_block_of,
    read_whole_tensors,
    threads_for,
    work_in_order,
)

__all__ = [
    "Bytes",
    "PairBlocks",
    "PairMaking",
    "Shipped",
    "Sides",
    "block_bytes",
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


class PairBlocks(NamedTuple):
    """A block of a tensor, or several tensors of one block each, as both sides have them."""

    tensors: Sequence[TensorInfo]
    """Of the tuned side."""
    place: int
    """Which of its blocks; 0 of several tensors."""
    starts: Sequence[int]
    """Where the bytes of each begin."""
    paired: Sequence[bool]
    """Whether the base has each, in this dtype and shape."""
    before: Bytes
    after: Bytes

    def each(self) -> Iterator[tuple[TensorInfo, Any, Bytes]]:
        """Each tensor, and the bytes of its block before, or None, and after."""
        for tensor, (start, stop), paired in zip(self.tensors, self.parts(), self.paired, strict=True):
            yield tensor, self.before[start:stop] if paired else None, self.after[start:stop]

    def parts(self) -> list[tuple[int, int]]:
        """From which byte to which the block of each lies."""
        return [
            (start, start + block_bytes(tensor, self.place))
            for tensor, start in zip(self.tensors, self.starts, strict=True)
        ]


class PairMaking(Protocol[Made]):
    """A patch on its way to its target, which it gets when it is finished."""

    @property
    def names(self) -> Sequence[str]:
        """The tensors of the tuned side, in the order in which the patch has them."""

    def work(self, blocks: PairBlocks) -> list[Any]:
        """Make what the patch holds of each block, in one of several threads; bytes are valid until it returns."""

    def take(self, tensors: Sequence[TensorInfo], place: int, found: Sequence[Any]) -> None:
        """Write that; called for one lot of blocks after the other, those of a tensor in their order."""

    def finish(self) -> Made:
        """Complete the patch, and let it take its name."""


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
    if any(tensor.slices for side in sides for tensor in side.tensors.values()):
        load_kernels(listener, "boxes")
    total = sum(side.nbytes for side in sides)
    with begin(stop, working) as making, stage(listener, "making the patch", total, "bytes") as told:
        base, tuned = sides
        rooms = threading.local()
        with open_shards("pread") as shards:

            def some(pieces: Sequence[Piece]) -> tuple[list[TensorInfo], int, Sequence[Any], int]:
                tensors, place = [tuned.tensors[name] for name, _ in pieces], pieces[0][1]
                partners = [partner_of(base, tensor) for tensor in tensors]
                sizes = [block_bytes(tensor, place) for tensor in tensors]
                starts, size = _starts(tensors, sizes)
                before, after = _room(rooms, size)
                there = [(one, start) for one, start in zip(partners, starts, strict=True) if one is not None]
                for room, side in ((after, list(zip(tensors, starts, strict=True))), (before, there)):
                    if len(tensors) > 1:
                        read_whole_tensors(shards, side, room)
                    elif side:
                        read_block_of(shards, side[0][0], Coding.of(tensors[0].dtype), place, room)
                paired = [partner is not None for partner in partners]
                found = making.work(PairBlocks(tensors, place, starts, paired, before, after))
                return tensors, place, found, sum(sizes) + sum(compress(sizes, paired))

            codes = ((name, codes_in(tuned.tensors[name])) for name in making.names)
            for tensors, place, found, read in work_in_order(in_pieces(codes), some, working, stop, told.again):
                making.take(tensors, place, found)
                told.more(read, tensors[-1].name)
        return making.finish()


def _starts(tensors: Sequence[TensorInfo], sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where tensors of so many bytes go, one behind the other as they are stored, but each where its codes may lie."""
    starts, end = [], 0
    for tensor, size in zip(tensors, sizes, strict=True):
        width = Coding.of(tensor.dtype).width
        starts.append(-(-end // width) * width)
        end = starts[-1] + size
    return starts, end


def _room(rooms: threading.local, size: int) -> list[Bytes]:
    """Two buffers of a thread."""
    found: list[Bytes] | None = getattr(rooms, "found", None)
    if found is None or found[0].size < size:
        found = rooms.found = [np.empty(size, np.uint8) for _ in range(2)]
    return found


def partner_of(base: Checkpoint, tensor: TensorInfo) -> TensorInfo | None:
    """What the base has of a tensor's name, if it has it in this dtype and shape."""
    found = base.tensors.get(tensor.name)
    return found if found is not None and found.dtype == tensor.dtype and found.shape == tensor.shape else None


def require_same_tensors(sides: Sides, format: str) -> None:
    """Refuse sides whose tensors differ in more than their values.

    Raises
    ------
    PatchError
        It names the first tensor that is new, lost, retyped or reshaped.
    """
    base, tuned = sides
    if base.tensors.keys() <= tuned.tensors.keys() and all(partner_of(base, one) for one in tuned.tensors.values()):
        return
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
    return extent_of(tensor.dtype, tensor.shape).codes


def blocks_in(tensor: TensorInfo) -> int:
    """Blocks that a tensor is read in; an empty one is read once."""
    return extent_of(tensor.dtype, tensor.shape).blocks or 1


def block_bytes(tensor: TensorInfo, place: int) -> int:
    """Bytes of one block of a tensor."""
    nbytes, coding, _, blocks = extent_of(tensor.dtype, tensor.shape)
    return min(BLOCK_CODES * coding.width, nbytes - place * BLOCK_CODES * coding.width) if blocks > 1 else nbytes


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
        dense=sides[1].nbytes,
        changed_bytes=changed_bytes,
        files=files,
        size=size,
        warnings=tuple(warning for side in sides for warning in side.warnings),
    )
