"""Make an exact weight delta of two checkpoints, in one pass over their bytes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from ckptdiff.checkpoint import TensorInfo, open_checkpoint
from ckptdiff.events import Listener
from ckptdiff.files.staged import StagedFile
from ckptdiff.patch.coded_block import Coding, code_block, code_whole
from ckptdiff.patch.comparing import PairBlocks, Sides, blocks_in, make_of_pair
from ckptdiff.patch.delta import Delta, TensorDelta, TunedFile
from ckptdiff.patch.delta_file import SIGNATURE, write_blob, write_index
from ckptdiff.patch.digests import BlockDigests, required
from ckptdiff.patch.side_files import SideFiles
from ckptdiff.patch.small_tensors import code_small, rows_of
from ckptdiff.patch.spans import load_kernels
from ckptdiff.runfile.check_target import check_new

__all__ = ["DeltaMaking", "MadeDelta", "begin_delta", "make"]

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
    sides = open_checkpoint(base), open_checkpoint(tuned)
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
        self._layout, self._staged, self._digests = layout, staged, BlockDigests(stop)
        self.names = [tensor.name for _, tensor in layout.tensors]
        self._file_of = {tensor.name: file for file, tensor in layout.tensors}
        self._tensors: dict[str, TensorDelta] = {}
        self._start, self._changed = 0, 0
        self._sizes: list[int] = []
        staged.write(SIGNATURE)
        self._files = tuple(
            TunedFile(layout.name(shard.path), shard.size, write_blob(staged, layout.header(file)))
            for file, shard in enumerate(layout.shards)
        )
        self._index = None if layout.index is None else (layout.index[0], write_blob(staged, layout.index[1]))
        self._waiting: list[bytes] = []
        self._end = staged.tell()

    def work(self, blocks: PairBlocks) -> list[tuple[bytes, int]]:
        """Code each block, and count the codes that changed; several small tensors in one compiled call."""
        several = len(blocks.tensors) > 1
        together = iter(code_small(blocks.before, blocks.after, rows_of(blocks.rows())) if several else ())
        found = []
        for tensor, before, after in blocks.each():
            self._digests.add(tensor.name, blocks.place, blocks_in(tensor), before, after)
            coding = Coding.of(tensor.dtype)
            if before is None:
                found.append((code_whole(after), after.size // coding.width) if after.size else (b"", 0))
            else:
                found.append(next(together) if several else code_block(before, after, coding))
        return found

    def take(self, tensor: TensorInfo, place: int, found: tuple[bytes, int]) -> None:
        """Write a coded block."""
        if place == 0:
            self._start, self._sizes, self._changed = self._end, [], 0
        self._waiting.append(found[0])
        self._end += len(found[0])
        self._sizes.append(len(found[0]))
        self._changed += found[1]
        if self._end - self._staged.tell() >= _AT_ONCE:
            self._write()
        if place == blocks_in(tensor) - 1:
            self._tensors[tensor.name] = self._done(tensor)

    def _write(self) -> None:
        self._staged.write(b"".join(self._waiting))
        self._staged.check()
        self._waiting.clear()

    def _done(self, tensor: TensorInfo) -> TensorDelta:
        before, after = self._digests.found.pop(tensor.name)
        whole = before is None
        done = TensorDelta(
            name=tensor.name,
            state="whole" if whole else "changed" if self._changed else "same",
            dtype=tensor.dtype,
            shape=tensor.shape,
            file=self._file_of[tensor.name],
            before=before,
            after=after,
            changed=self._changed,
            replaces=whole and tensor.name in self._base.tensors,
        )
        if done.state == "same":
            return done
        return replace(done, offset=self._start, sizes=tuple(self._sizes[: done.blocks]))

    def finish(self) -> MadeDelta:
        """Write the index, and let the delta take its name."""
        self._write()
        lost = {
            name: TensorDelta(name, "lost", tensor.dtype, tensor.shape, -1, None, None, 0)
            for name, tensor in self._base.tensors.items()
            if name not in self._tensors
        }
        delta = Delta(
            made_by=f"ckptdiff {version('ckptdiff')}",
            base=self._base.path,
            tuned=self._tuned.path,
            base_files=tuple((Path(shard.path).name, shard.size, shard.header_sha256) for shard in self._base.shards),
            single=self._layout.single,
            files=self._files,
            index=self._index,
            tensors={name: self._tensors[name] for name in self.names} | lost,
        )
        write_index(self._staged, delta)
        self._staged.commit()
        warnings = tuple(warning for side in (self._base, self._tuned) for warning in side.warnings)
        return MadeDelta(delta, self._staged.tell(), warnings)
