"""Make an exact weight delta of two checkpoints, in one pass over their bytes."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from ckptdiff.checkpoint.index import MAX_INDEX_BYTES
from ckptdiff.checkpoint.open_shards import OpenShards, open_shards
from ckptdiff.checkpoint.regular_file import open_regular, read_bytes, read_whole
from ckptdiff.events import Listener, Stage, stage
from ckptdiff.files.staged import StagedFile
from ckptdiff.patch.coded_block import Coding, code_block, code_whole
from ckptdiff.patch.delta import BLOCK_CODES, Delta, TensorDelta, TunedFile
from ckptdiff.patch.delta_file import SIGNATURE, write_blob, write_index
from ckptdiff.patch.digests import TensorDigest, digest_of, required
from ckptdiff.patch.side_files import SideFiles
from ckptdiff.patch.small_tensors import code_small, rows_of
from ckptdiff.patch.spans import (
    Piece,
    in_pieces,
    load_kernels,
    read_block_of,
    read_whole_tensors,
    threads_for,
    work_in_order,
)
from ckptdiff.runfile.check_target import check_new

__all__ = ["MadeDelta", "make"]


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
    layout = SideFiles(sides[1], Path(tuned))
    total = sum(tensor.nbytes for side in sides for tensor in side.tensors.values())
    with StagedFile(target) as staged, open_shards("pread") as shards:
        with stage(listener, "making the patch", total, "bytes") as told:
            made = _Making(sides, shards, layout, staged, told, threads_for(threads)).run()
        shards.check()
        staged.commit()
    return MadeDelta(made, staged.tell(), tuple(warning for side in sides for warning in side.warnings))


_Coded: TypeAlias = list[tuple[Piece, bytes, int]]


class _Making:
    """One delta on its way into a file."""

    def __init__(
        self,
        sides: tuple[Checkpoint, Checkpoint],
        shards: OpenShards,
        layout: SideFiles,
        staged: StagedFile,
        told: Stage,
        threads: int,
    ) -> None:
        self._base, self._tuned = sides
        self._shards, self._layout, self._staged, self._told, self._threads = shards, layout, staged, told, threads
        self._stop = threading.Event()
        self._rooms = threading.local()
        self._digests: dict[str, tuple[TensorDigest, TensorDigest]] = {}
        self._found: dict[str, tuple[str | None, str]] = {}

    def run(self) -> Delta:
        self._staged.write(SIGNATURE)
        files = self._files()
        index = None
        if self._layout.index is not None:
            path = self._layout.index.path
            index = Path(path).name, write_blob(self._staged, read_whole(path, MAX_INDEX_BYTES))
        tensors = self._tensors()
        delta = Delta(
            made_by=f"ckptdiff {version('ckptdiff')}",
            base=self._base.path,
            tuned=self._tuned.path,
            base_files=tuple((Path(shard.path).name, shard.size, shard.header_sha256) for shard in self._base.shards),
            single=self._layout.single,
            files=files,
            index=index,
            tensors=tensors,
        )
        write_index(self._staged, delta)
        return delta

    def _files(self) -> tuple[TunedFile, ...]:
        found = []
        for shard, size in zip(self._layout.shards, self._layout.header_sizes, strict=True):
            with open_regular(shard.path) as (descriptor, _):
                header = read_bytes(descriptor, size, 0, shard.path)
            found.append(TunedFile(self._layout.name(shard.path), shard.size, write_blob(self._staged, header)))
        return tuple(found)

    def _partner(self, tensor: TensorInfo) -> TensorInfo | None:
        """What the base has of a tensor's name, if steps lead from the one to the other."""
        base = self._base.tensors.get(tensor.name)
        return base if base is not None and (base.dtype, base.shape) == (tensor.dtype, tensor.shape) else None

    def _tensors(self) -> dict[str, TensorDelta]:
        done: dict[str, TensorDelta] = {}
        file_of = {tensor.name: file for file, tensor in self._layout.tensors}
        codes = ((one.name, one.nbytes // Coding.of(one.dtype).width) for _, one in self._layout.tensors)
        sizes: list[int] = []
        changed = start = 0
        for coded in work_in_order(in_pieces(codes), self._coded, self._threads, self._stop, self._told.again):
            at, read = self._staged.tell(), 0
            self._staged.write(b"".join([data for _, data, _ in coded]))
            for (name, place), data, count in coded:
                if place == 0:
                    sizes, changed, start = [], 0, at
                at += len(data)
                sizes.append(len(data))
                changed += count
                tensor = self._tuned.tensors[name]
                coding = Coding.of(tensor.dtype)
                block = BLOCK_CODES * coding.width
                read += min(block, tensor.nbytes) * (1 if self._partner(tensor) is None else 2)
                if (place + 1) * block >= tensor.nbytes:
                    done[name] = self._done(tensor, file_of[name], start, sizes, changed)
            self._told.more(read, name)
            self._staged.check()
        lost = {
            name: TensorDelta(name, "lost", tensor.dtype, tensor.shape, -1, None, None, 0)
            for name, tensor in self._base.tensors.items()
            if name not in done
        }
        return done | lost

    def _done(self, tensor: TensorInfo, file: int, start: int, sizes: Sequence[int], changed: int) -> TensorDelta:
        before, after = self._found.pop(tensor.name)
        whole = self._partner(tensor) is None
        kept = changed > 0 or whole
        return TensorDelta(
            name=tensor.name,
            state="whole" if whole else "changed" if changed else "same",
            dtype=tensor.dtype,
            shape=tensor.shape,
            file=file,
            before=before,
            after=after,
            changed=changed,
            offset=start if kept else 0,
            sizes=tuple(sizes) if kept and tensor.nbytes else (),
            replaces=whole and tensor.name in self._base.tensors,
        )

    def _coded(self, pieces: Sequence[Piece]) -> _Coded:
        return self._coded_small([name for name, _ in pieces]) if len(pieces) > 1 else [self._coded_block(*pieces[0])]

    def _coded_block(self, name: str, place: int) -> tuple[Piece, bytes, int]:
        tensor = self._tuned.tensors[name]
        base, coding = self._partner(tensor), Coding.of(tensor.dtype)
        buffers = self._buffers(min(BLOCK_CODES * coding.width, tensor.nbytes))
        after = read_block_of(self._shards, tensor, coding, place, buffers[1])
        before = None if base is None else read_block_of(self._shards, base, coding, place, buffers[0])
        self._digest(tensor, place, before, after)
        if before is not None:
            return (name, place), *code_block(before, after, coding)
        return (name, place), *((code_whole(after), after.size // coding.width) if after.size else (b"", 0))

    def _coded_small(self, names: Sequence[str]) -> _Coded:
        """Code tensors of one block each."""
        tensors = [self._tuned.tensors[name] for name in names]
        partners = [self._partner(tensor) for tensor in tensors]
        starts = [0, *accumulate(tensor.nbytes for tensor in tensors)]
        first, second = self._buffers(starts[-1])
        before, after = first[: starts[-1]], second[: starts[-1]]
        paired = [place for place, partner in enumerate(partners) if partner is not None]
        read_whole_tensors(self._shards, tensors, starts, after)
        read_whole_tensors(self._shards, [one for one in partners if one], [starts[place] for place in paired], before)
        codings = [Coding.of(tensor.dtype) for tensor in tensors]
        counts = [tensor.nbytes // coding.width for tensor, coding in zip(tensors, codings, strict=True)]
        rows = rows_of((starts[place], counts[place], codings[place]) for place in paired)
        coded = dict(zip(paired, code_small(before, after, rows), strict=True))
        found: _Coded = []
        for place, name in enumerate(names):
            old, new = before[starts[place] : starts[place + 1]], after[starts[place] : starts[place + 1]]
            self._digest(tensors[place], 0, old if place in coded else None, new)
            whole = (code_whole(new), counts[place]) if place not in coded and new.size else (b"", 0)
            found.append(((name, 0), *coded.get(place, whole)))
        return found

    def _digest(self, tensor: TensorInfo, place: int, before: object, after: object) -> None:
        name = tensor.name
        coding = Coding.of(tensor.dtype)
        last = max(-(-tensor.nbytes // (BLOCK_CODES * coding.width)), 1) - 1
        if not last:
            self._found[name] = None if before is None else digest_of(before), digest_of(after)
            return
        both = self._digests.setdefault(name, (TensorDigest(self._stop), TensorDigest(self._stop)))
        both[1].add(place, after)
        if before is not None:
            both[0].add(place, before)
        if place == last:
            del self._digests[name]
            self._found[name] = None if before is None else both[0].value(), both[1].value()

    def _buffers(self, size: int) -> list[NDArray[np.uint8]]:
        found = getattr(self._rooms, "found", None)
        if found is None or found[0].size < size:
            found = self._rooms.found = [np.empty(size, np.uint8) for _ in range(2)]
        return found
