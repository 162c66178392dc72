"""What a chain asks of a patch of any format, and what those have in common that engines load, not ckptdiff."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import Checkpoint
from ckptdiff.errors import PatchError
from ckptdiff.patch.delta import Blob, Delta, State, TensorDelta, TunedFile, extent_of
from ckptdiff.patch.in_turn import InTurn
from ckptdiff.patch.side_files import SideFiles
from ckptdiff.patch.small_frames import SmallFrames

__all__ = ["FETCH_AGAIN", "Apply", "GivenSide", "Link", "StreamLink", "scattered"]

Bytes: TypeAlias = NDArray[np.uint8]
Apply: TypeAlias = Callable[[Bytes], None]
"""Makes the new bytes of a block of the old ones, in place."""
_AT_ONCE = 1 << 18
"""Positions that are read at a time."""
FETCH_AGAIN = "the download or copy may be incomplete: fetch it again, or make it again"


class _Tensor(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class GivenSide(Protocol):
    """What a patch is applied to: a checkpoint, or a live model."""

    @property
    def path(self) -> str:
        """How errors name it."""

    @property
    def tensors(self) -> Mapping[str, _Tensor]:
        """By name."""


class Link(Protocol):
    """A patch in a chain; used by many threads.

    Attributes
    ----------
    path : str
    identity : str
        Tells two patches apart.
    delta : Delta
        What becomes of each tensor, and the files of the result.
    repeatable : bool
        Whether a base to which it has been applied already may be given again.
    """

    path: str
    identity: str
    delta: Delta
    repeatable: bool

    def apply(self, tensor: TensorDelta, place: int, codes: Bytes, stop: threading.Event) -> None:
        """Make the new bytes of one block of a tensor of the old ones, in place."""

    def apply_small(
        self, tensors: Sequence[TensorDelta], starts: Sequence[int], codes: Bytes, stop: threading.Event
    ) -> None:
        """Do so with several tensors of one block, each of which begins at one byte of the codes."""

    def header(self, file: int) -> bytes:
        """The first bytes of a file of the result, up to the first tensor's."""

    def side_index(self) -> tuple[str, bytes] | None:
        """Name and bytes of the result's ``index.json``."""

    def damaged(self, problem: str, expected: object, found: object, tensor: str | None = None) -> PatchError:
        """An error that says that the patch is damaged."""


class StreamLink:
    """A patch that says how values change and nothing else: files and headers of the result are the base's.

    Its tensors can be read from their beginning only, so the threads with the blocks of one take turns.

    Parameters
    ----------
    path, identity : str
    base : Checkpoint or other side
        The base of the whole chain; only of a checkpoint are there files.
    digests : mapping of str to (str or None, str or None)
        Of each tensor of the base, before and after, as far as they are known.
    begin : mapping of str to callable
        Of each changed tensor, what begins to read it; it takes what the chain knows of the tensor, and yields what is
        to be done with each block.
    repeatable : bool
        Whether a base to which it has been applied already may be given again.
    small : callable, optional
        Makes many small tensors, and returns those that it has not.
    """

    def __init__(
        self,
        path: str,
        identity: str,
        base: GivenSide,
        digests: Mapping[str, tuple[str | None, str | None]],
        begin: Mapping[str, Callable[[TensorDelta], Iterator[Apply]]],
        repeatable: bool = False,
        small: SmallFrames | None = None,
    ) -> None:
        self.path, self.identity, self.repeatable, self._small = path, identity, repeatable, small
        self._begin, self._files = begin, SideFiles(base) if isinstance(base, Checkpoint) else None
        self._begun: dict[str, tuple[InTurn, Iterator[Apply]]] = {}
        if self._files is None:
            files: tuple[TunedFile, ...] = ()
            held: list[tuple[int, _Tensor]] = [(0, one) for one in base.tensors.values()]
            index = None
        else:
            self._files.require_safetensors()
            sizes, index = self._files.header_sizes, self._files.index
            files = tuple(
                TunedFile(self._files.name(shard.path), shard.size, Blob(0, size, size))
                for shard, size in zip(self._files.shards, sizes, strict=True)
            )
            held = list(self._files.tensors)
        self.delta = Delta(
            made_by="",
            base="",
            tuned="",
            base_files=(),
            single=self._files is not None and self._files.single,
            files=files,
            index=None if index is None else (index[0], Blob(0, 0, 0)),
            tensors={one.name: self._tensor(one, file, *digests[one.name]) for file, one in held},
        )

    def _tensor(self, one: _Tensor, file: int, before: str | None, after: str | None) -> TensorDelta:
        state: State = "changed" if one.name in self._begin else "same"
        extent = extent_of(one.dtype, one.shape)
        return TensorDelta(one.name, state, one.dtype, one.shape, file, before, after, 0, extent)

    def apply(self, tensor: TensorDelta, place: int, codes: Bytes, stop: threading.Event) -> None:
        """Make the new bytes of one block of a tensor of the old ones, in place."""
        if tensor.state == "same":
            return
        if tensor.blocks == 1:
            next(self._begin[tensor.name](tensor))(codes)
            return
        turns, changes = self._begun.setdefault(tensor.name, (InTurn(stop), self._begin[tensor.name](tensor)))
        with turns.at(place):
            change = next(changes)
        if place == tensor.blocks - 1:
            del self._begun[tensor.name]
        change(codes)

    def apply_small(
        self, tensors: Sequence[TensorDelta], starts: Sequence[int], codes: Bytes, stop: threading.Event
    ) -> None:
        """Do so with several tensors of one block, each of which begins at one byte of the codes."""
        ones = [(tensor, start) for tensor, start in zip(tensors, starts, strict=True) if tensor.state == "changed"]
        for tensor, start in ones if self._small is None else self._small(ones, codes):
            self.apply(tensor, 0, codes[start : start + tensor.nbytes], stop)

    def header(self, file: int) -> bytes:
        """The first bytes of a file of the base."""
        if self._files is None:
            raise ValueError("a live model has no files")
        return self._files.header(file)

    def side_index(self) -> tuple[str, bytes] | None:
        """Name and bytes of the base's ``index.json``."""
        return None if self._files is None else self._files.index

    def damaged(self, problem: str, expected: object, found: object, tensor: str | None = None) -> PatchError:
        """An error that says that the patch is damaged."""
        return PatchError(problem, file=self.path, tensor=tensor, expected=expected, found=found, hint=FETCH_AGAIN)


def scattered(
    positions: Callable[[int], NDArray[np.integer]],
    values: Callable[[int], NDArray[np.uint8]],
    count: int,
    size: int,
    block: int,
    wrong: Callable[[object, object], PatchError],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """Read ascending positions and the values that belong there, block by block.

    Parameters
    ----------
    positions, values : callable
        Return the next so many of them.
    count : int
        How many there are.
    size, block : int
        Places of the tensor, and of each of its blocks.
    wrong : callable
        Makes an error of what was expected and found, for positions that do not ascend below `size`.

    Yields
    ------
    int64 array, uint8 array
        Positions in the block, and values.
    """
    held, taken, last = np.empty(0, np.int64), 0, -1
    for start in range(0, size, block):
        parts = []
        while True:
            if not held.size and taken < count:
                held = positions(min(count - taken, _AT_ONCE)).astype(np.int64)
                before = np.concatenate([[last], held[:-1]])
                bad = np.flatnonzero((held <= before) | (held >= size))
                if bad.size:
                    expected = f"more than {before[bad[0]]}, and below {size}"
                    raise wrong(expected, f"{held[bad[0]]} at position {taken + bad[0]}")
                taken, last = taken + held.size, int(held[-1])
            cut = int(np.searchsorted(held, start + block))
            parts.append(held[:cut])
            held = held[cut:]
            if held.size or taken == count:
                break
        at = np.concatenate(parts) - start
        yield at, values(at.size)
