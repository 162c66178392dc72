"""Make an exact weight delta of two checkpoints, in one pass over their bytes."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from itertools import compress
from pathlib import Path
from typing import TypeAlias

from ckptdiff.checkpoint import TensorInfo
from ckptdiff.checkpoint.checkpoint import open_pair
from ckptdiff.events import Listener
from ckptdiff.files.staged import StagedFile
from ckptdiff.patch.coded_block import Coding, code_block, code_whole
from ckptdiff.patch.comparing import Bytes, PairBlocks, Sides, blocks_in, make_of_pair
from ckptdiff.patch.delta import Delta, State, TensorDelta, TunedFile, extent_of
from ckptdiff.patch.delta_file import SIGNATURE, write_blob, write_index
from ckptdiff.patch.delta_index import IndexText
from ckptdiff.patch.digests import BlockDigests, digests_of_parts, required
from ckptdiff.patch.side_files import SideFiles
from ckptdiff.patch.small_tensors import code_small, rows_of
from ckptdiff.patch.spans import load_kernels
from ckptdiff.runfile.check_target import check_new

__all__ = ["DeltaMaking", "MadeDelta", "begin_delta", "make"]

_Coded: TypeAlias = tuple[bytes, int, Sequence[str | None]]
"""A block, how many of its codes changed, and with the last of a tensor digests of both sides."""
_AT_ONCE = 1 << 20
"""Coded bytes that are written together."""


@dataclass(frozen=True, slots=True)
class MadeDelta:
    """A delta that was written.

    Attributes
    ----------
    delta : Delta
        What its index says.
    size : int
        Its bytes.
    warnings : tuple of str
    """

    delta: Delta
    size: int
    warnings: tuple[str, ...]


def make(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    threads: int = 0,
    listener: Listener | None = None,
) -> MadeDelta:
    """Write what makes `tuned` of `base`, to the last bit of every file.

    Tensors are paired by their names. Of those that have one dtype and shape on both sides, changed codes are kept, and
    by how many steps each; new ones and those of another dtype or shape are kept whole.

    Parameters
    ----------
    base, tuned : path-like
        Checkpoints, as `open_checkpoint` takes them.
    target : path-like
        The delta to write; it must not exist.
    threads : int
        0 stands for one per core.
    listener : callable, optional
        Told of the stage "making the patch", in bytes.

    Returns
    -------
    MadeDelta

    Raises
    ------
    CheckpointError
        A side cannot be read, or changes while it is read.
    OptionError
        xxhash is missing.
    RunFileError
        The target exists or cannot be written.

    Examples
    --------
    >>> from ckptdiff import patch
    >>> made = patch.make("fixtures/llama/base", "fixtures/llama/tuned", "update.ckptdelta")
    >>> patch.apply("fixtures/llama/base", ["update.ckptdelta"], "again").tensors == len(made.delta.tensors)
    True
    """
    required("xxhash")
    target = Path(target)
    sides = open_pair(os.fspath(base), os.fspath(tuned))
    check_new(target)
    load_kernels(listener)
    return make_of_pair(sides, partial(begin_delta, sides, target), threads, listener)


@contextmanager
def begin_delta(sides: Sides, target: Path, stop: threading.Event, threads: int) -> Iterator[DeltaMaking]:
    """Begin a delta of two sides, which :func:`~ckptdiff.patch.comparing.make_of_pair` goes on with."""
    del threads  # who hands in blocks has them
    layout = SideFiles(sides[1])
    layout.require_safetensors()
    with StagedFile(target) as staged:
        yield DeltaMaking(sides, layout, staged, stop)


class DeltaMaking:
    """One delta on its way into a file."""

    def __init__(self, sides: Sides, layout: SideFiles, staged: StagedFile, stop: threading.Event) -> None:
        self._base, self._tuned = sides
        self._staged, self._digests = staged, BlockDigests(stop)
        self.names = [tensor.name for _, tensor in layout.tensors]
        self._file_of = {tensor.name: file for file, tensor in layout.tensors}
        self._layout, self._tensors = layout, dict[str, TensorDelta]()
        self._start, self._changed, self._end = 0, 0, 0
        self._sizes: list[int] = []
        self._waiting: list[bytes] = []
        self._unlisted = deque(self.names)

    @cached_property
    def _begun(self) -> tuple[Delta, IndexText]:
        """What the delta says of its sides, once their headers are written: while threads make the first blocks."""
        layout, staged = self._layout, self._staged
        staged.write(SIGNATURE)
        files = tuple(
            TunedFile(layout.name(shard.path), shard.size, write_blob(staged, layout.header(file)))
            for file, shard in enumerate(layout.shards)
        )
        delta = Delta(
            made_by=f"ckptdiff {version('ckptdiff')}",
            base=self._base.path,
            tuned=self._tuned.path,
            base_files=tuple((Path(shard.path).name, shard.size, shard.header_sha256) for shard in self._base.shards),
            single=layout.single,
            files=files,
            index=None if layout.index is None else (layout.index[0], write_blob(staged, layout.index[1])),
            tensors=self._tensors,
        )
        self._end = staged.tell()
        return delta, IndexText(delta)

    def work(self, blocks: PairBlocks) -> list[_Coded]:
        """Code each block, count the codes that changed, and digest both sides; small tensors in one compiled call."""
        if len(blocks.tensors) > 1:
            return self._small(blocks)
        ((tensor, before, after),) = blocks.each()
        digests = self._digests.add(tensor.name, blocks.place, blocks_in(tensor), before, after)
        if before is None:
            return [(*_whole(tensor, after), digests)]
        return [(*code_block(before, after, Coding.of(tensor.dtype)), digests)]

    def _small(self, blocks: PairBlocks) -> list[_Coded]:
        extents = [extent_of(tensor.dtype, tensor.shape) for tensor in blocks.tensors]
        rows = ((start, one.codes, one.coding) for start, one in zip(blocks.starts, extents, strict=True))
        coded = code_small(blocks.before, blocks.after, rows_of(compress(rows, blocks.paired)))
        parts = [(start, start + one.nbytes) for start, one in zip(blocks.starts, extents, strict=True)]
        after: list[str | None] = [*digests_of_parts(blocks.after, parts)]
        before: list[str | None] = [*digests_of_parts(blocks.before, compress(parts, blocks.paired))]
        for place, (tensor, paired) in enumerate(zip(blocks.tensors, blocks.paired, strict=True)):
            if not paired:
                coded.insert(place, _whole(tensor, blocks.after[slice(*parts[place])]))
                before.insert(place, None)
        return [(*one, digests) for one, digests in zip(coded, zip(before, after, strict=True), strict=True)]

    def take(self, tensors: Sequence[TensorInfo], place: int, found: Sequence[_Coded]) -> None:
        """Write coded blocks, and say in the index what is known now."""
        _, index = self._begun
        for tensor, (coded, changed, digests) in zip(tensors, found, strict=True):
            if place == 0:
                self._start, self._sizes, self._changed = self._end, [], 0
            self._waiting.append(coded)
            self._end += len(coded)
            self._sizes.append(len(coded))
            self._changed += changed
            if digests:
                self._tensors[tensor.name] = self._done(tensor, *digests)
        if self._end - self._staged.tell() >= _AT_ONCE:
            self._write()
        known = []
        while self._unlisted and self._unlisted[0] in self._tensors:
            known.append(self._tensors[self._unlisted.popleft()])
        index.add(known)

    def _write(self) -> None:
        self._staged.write(b"".join(self._waiting))
        self._staged.check()
        self._waiting.clear()

    def _done(self, tensor: TensorInfo, before: str | None, after: str | None) -> TensorDelta:
        whole, extent = before is None, extent_of(tensor.dtype, tensor.shape)
        state: State = "whole" if whole else "changed" if self._changed else "same"
        return TensorDelta(
            tensor.name,
            state,
            tensor.dtype,
            tensor.shape,
            self._file_of[tensor.name],
            before,
            after,
            self._changed,
            extent,
            0 if state == "same" else self._start,
            () if state == "same" or not extent.codes else tuple(self._sizes),
            whole and tensor.name in self._base.tensors,
        )

    def finish(self) -> MadeDelta:
        """Write the index, and let the delta take its name."""
        delta, index = self._begun
        self._write()
        lost = {
            name: TensorDelta(name, "lost", one.dtype, one.shape, -1, None, None, 0, extent_of(one.dtype, one.shape))
            for name, one in self._base.tensors.items()
            if name not in self._tensors
        }
        index.add(lost.values())
        write_index(self._staged, index)
        self._staged.commit()
        warnings = tuple(warning for side in (self._base, self._tuned) for warning in side.warnings)
        tensors = {name: self._tensors[name] for name in self.names} | lost
        return MadeDelta(replace(delta, tensors=tensors), self._staged.tell(), warnings)


def _whole(tensor: TensorInfo, after: Bytes) -> tuple[bytes, int]:
    """A block that is kept as it is, and its codes."""
    return (code_whole(after), after.size // Coding.of(tensor.dtype).width) if after.size else (b"", 0)
