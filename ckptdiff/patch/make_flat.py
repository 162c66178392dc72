"""Make a safetensors file of flat indices and new values: what vLLM's and verl's sparse weight patches are made of.

Of each tensor ``NAME`` that changed there are ``NAME.indices``, row-major and ascending, int32 where that is enough,
else int64, and ``NAME.values``; or, where such engines take no sparse patch, ``NAME`` as a whole. The metadata are
``format``, ``version``, and as JSON the ``shapes`` of these tensors and the digests (xxh3-128) of all tensors,
``before`` and ``after``.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ckptdiff.checkpoint import DTYPES, Kind, TensorInfo
from ckptdiff.checkpoint.blocks import blocks_of
from ckptdiff.checkpoint.checkpoint import open_pair
from ckptdiff.checkpoint.open_shards import OpenShards, open_shards
from ckptdiff.errors import OptionError, PatchError
from ckptdiff.events import Listener
from ckptdiff.files.staged import StagedFile
from ckptdiff.formats import stored_format
from ckptdiff.patch.coded_block import Coding
from ckptdiff.patch.comparing import (
    Bytes,
    PairBlocks,
    Shipped,
    Sides,
    blocks_in,
    make_of_pair,
    require_same_tensors,
    shipped,
    spooled,
)
from ckptdiff.patch.delta import BLOCK_CODES
from ckptdiff.patch.digests import BlockDigests, required
from ckptdiff.runfile.check_target import check_new
from ckptdiff.runfile.safetensors_file import Entry, write_safetensors

__all__ = ["FLAT_FORMAT", "FLAT_VERSION", "INDICES", "VALUES", "FlatMaking", "begin_flat", "make_flat"]

FLAT_FORMAT, FLAT_VERSION = "ckptdiff-flat", "1"
INDICES, VALUES = ".indices", ".values"
_Changes: TypeAlias = tuple[Any, Any, int, str | None]
"""Where values of a block changed, the new ones, in how many bytes, and why not to send them."""


def make_flat(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dense_rest: bool = False,
    threads: int = 0,
    listener: Listener | None = None,
) -> Shipped:
    """Write where values of `tuned` differ from `base` in any bit, and what they are.

    Parameters
    ----------
    base, tuned : as :func:`make_directory` takes them
    target : path-like
        A new name in ``.safetensors``.
    dense_rest : bool
        Whether to send whole what engines take no sparse patch of: tensors of other than floating dtypes, and those in
        which a value becomes NaN, by which engines mark what does not change.
    threads, listener : as :func:`make_directory` takes them

    Returns
    -------
    Shipped

    Raises
    ------
    CheckpointError
        A side cannot be read, or changes while it is read.
    OptionError
        xxhash is missing, or the target has another name.
    PatchError
        A tensor is new, lost, retyped or reshaped, or would have to be sent whole.
    RunFileError
        The target exists or cannot be written.

    Examples
    --------
    >>> base, tuned = "fixtures/llama/base", "fixtures/llama/tuned"
    >>> from ckptdiff import patch
    >>> patch.make_flat(base, tuned, "flat.safetensors").changed
    39469
    """
    target = Path(target)
    sides = open_pair(os.fspath(base), os.fspath(tuned))
    check_new(target)
    return make_of_pair(sides, partial(begin_flat, sides, target, dense_rest=dense_rest), threads, listener)


@contextmanager
def begin_flat(
    sides: Sides, target: Path, stop: threading.Event, threads: int, *, dense_rest: bool = False
) -> Iterator[FlatMaking]:
    """Begin a flat patch of two sides, which :func:`~ckptdiff.patch.comparing.make_of_pair` goes on with.

    Parameters and errors as of :func:`make_flat`.
    """
    del threads  # who hands in blocks has them
    required("xxhash")
    if target.suffix != ".safetensors":
        raise OptionError("a flat patch is a safetensors file", expected="a name in .safetensors", found=target.name)
    require_same_tensors(sides, "a flat patch")
    spools = [StagedFile(target.with_name(target.name + part)) for part in (INDICES, VALUES)]
    with spools[0] as indices, spools[1] as values:
        yield FlatMaking(sides, target, dense_rest, indices, values, stop)


class FlatMaking:
    """One flat patch: indices and values go to files without a name, from which they are copied behind the header."""

    def __init__(
        self,
        sides: Sides,
        target: Path,
        dense_rest: bool,
        indices: StagedFile,
        values: StagedFile,
        stop: threading.Event,
    ) -> None:
        self._sides, self._target, self._dense_rest = sides, target, dense_rest
        self._indices, self._values = indices, values
        self.names = list(sides[1].tensors)
        self._digests = BlockDigests(stop)
        self._found: dict[str, Sequence[str | None]] = {}
        self._sparse: dict[str, list[Entry]] = {}
        self._dense: set[str] = set()
        self._changed = self._changed_bytes = 0
        self._starts, self._count = (0, 0), 0
        self._problem: str | None = None

    def work(self, blocks: PairBlocks) -> list[tuple[_Changes | None, Sequence[str | None]]]:
        """What changed in each block, and digests of both sides with the last of a tensor."""
        return [
            (
                self._changes(tensor, blocks.place, before, after),
                self._digests.add(tensor.name, blocks.place, blocks_in(tensor), before, after),
            )
            for tensor, before, after in blocks.each()
        ]

    def _changes(self, tensor: TensorInfo, place: int, before: Bytes, after: Bytes) -> _Changes | None:
        code = f"<u{Coding.of(tensor.dtype).width}"
        old, new = before.view(code), after.view(code)
        at = np.flatnonzero(old != new)
        if not at.size:
            return None
        values, problem = new[at], None
        sign = 1 << (8 * values.itemsize - 1)
        if DTYPES[tensor.dtype].kind is not Kind.FLOAT:
            problem = "its dtype is not a floating one"
        elif np.any((values & values.dtype.type(sign - 1)) >= stored_format(tensor.dtype).nan):
            problem = "a value becomes NaN"
        changed_bytes = int(np.count_nonzero(before != after))
        return (at + place * BLOCK_CODES).astype(_index_of(tensor)), values, changed_bytes, problem

    def take(
        self,
        tensors: Sequence[TensorInfo],
        place: int,
        found: Sequence[tuple[_Changes | None, Sequence[str | None]]],
    ) -> None:
        """Spool what changed in blocks; at the last of a tensor, note where that is."""
        for tensor, (changes, digests) in zip(tensors, found, strict=True):
            self._spool(tensor, place, changes)
            if digests:
                self._found[tensor.name] = digests
        for spool in (self._indices, self._values):
            spool.check()

    def _spool(self, tensor: TensorInfo, place: int, found: _Changes | None) -> None:
        spools = self._indices, self._values
        if place == 0:
            self._starts, self._count, self._problem = (spools[0].tell(), spools[1].tell()), 0, None
        if found is not None:
            at, values, changed_bytes, problem = found
            self._count += at.size
            self._changed_bytes += changed_bytes
            self._problem = self._problem or problem
            if self._problem is None:
                self._indices.write(at.view(np.uint8).data)
                self._values.write(values.view(np.uint8).data)
        if place == blocks_in(tensor) - 1 and self._count:
            self._changed += self._count
            if self._problem is None:
                self._sparse[tensor.name] = self._entries(tensor)
            else:
                self._send_whole(tensor, self._problem)

    def _entries(self, tensor: TensorInfo) -> list[Entry]:
        index, count = _index_of(tensor), self._count
        parts = (
            (INDICES, f"I{8 * index.itemsize}", self._indices, index.itemsize),
            (VALUES, tensor.dtype, self._values, Coding.of(tensor.dtype).width),
        )
        return [
            Entry(tensor.name + part, dtype, (count,), spooled(spool, start, count * size))
            for (part, dtype, spool, size), start in zip(parts, self._starts, strict=True)
        ]

    def _send_whole(self, tensor: TensorInfo, problem: str) -> None:
        if not self._dense_rest:
            raise PatchError(
                f"engines take no sparse patch of this tensor: {problem}",
                file=self._sides[1].path,
                tensor=tensor.name,
                expected="new values of a floating dtype, none of them NaN",
                found=tensor.dtype,
                hint="--dense-rest sends such tensors whole",
            )
        self._dense.add(tensor.name)
        for spool, start in zip((self._indices, self._values), self._starts, strict=True):
            spool.seek(start)
            spool.truncate(start)

    def finish(self) -> Shipped:
        """Copy everything behind a header, and let the patch take its name; whole tensors are read for that."""
        tensors = self._sides[1].tensors
        changed = [name for name in self.names if name in self._sparse or name in self._dense]
        digests = [{name: self._found[name][which] for name in self.names} for which in (0, 1)]
        shapes = {name: list(tensors[name].shape) for name in changed}
        facts = {"shapes": shapes, "before": digests[0], "after": digests[1]}
        texts = {key: json.dumps(value, ensure_ascii=False, separators=(",", ":")) for key, value in facts.items()}
        with StagedFile(self._target) as staged:
            with open_shards("pread") as shards:
                entries = [entry for name in changed if name in self._sparse for entry in self._sparse[name]]
                for name in changed:
                    if name in self._dense:
                        one = tensors[name]
                        entries.append(Entry(name, one.dtype, one.shape, partial(_stored, shards, one)))
                write_safetensors(staged, entries, {"format": FLAT_FORMAT, "version": FLAT_VERSION, **texts})
            staged.commit()
            return shipped(self._sides, len(changed), self._changed, self._changed_bytes, 1, staged.tell())


def _stored(shards: OpenShards, tensor: TensorInfo) -> Iterator[Any]:
    """The bytes of a tensor, piece by piece."""
    return (block.data for block in blocks_of(shards, tensor, BLOCK_CODES))


def _index_of(tensor: TensorInfo) -> np.dtype[Any]:
    return np.dtype("<i4" if tensor.numel <= 1 << 31 else "<i8")
