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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ckptdiff.checkpoint import DTYPES, Checkpoint, Kind, TensorInfo, open_checkpoint
from ckptdiff.checkpoint.blocks import blocks_of
from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.errors import OptionError, PatchError
from ckptdiff.events import Listener, Stage, stage
from ckptdiff.files.staged import StagedFile
from ckptdiff.formats import stored_format
from ckptdiff.patch.coded_block import Coding
from ckptdiff.patch.comparing import Bytes, Shipped, blocks_in, compared, require_same_tensors, shipped, spooled
from ckptdiff.patch.delta import BLOCK_CODES
from ckptdiff.patch.digests import TensorDigest, required
from ckptdiff.patch.spans import threads_for
from ckptdiff.runfile.check_target import check_new
from ckptdiff.runfile.safetensors_file import Entry, write_safetensors

__all__ = ["FLAT_FORMAT", "FLAT_VERSION", "INDICES", "VALUES", "make_flat"]

FLAT_FORMAT, FLAT_VERSION = "ckptdiff-flat", "1"
INDICES, VALUES = ".indices", ".values"


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
    base, tuned : path-like
        Checkpoints with the same tensors, as `open_checkpoint` takes them.
    target : path-like
        A new name in ``.safetensors``.
    dense_rest : bool
        Whether to send whole what engines take no sparse patch of: tensors of other than floating dtypes, and those in
        which a value becomes NaN, by which engines mark what does not change.
    threads : int
        0 stands for one per core. The result does not depend on it.
    listener : callable, optional
        Told of the stage "making the patch", in bytes.

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
    required("xxhash")
    target = Path(target)
    if target.suffix != ".safetensors":
        raise OptionError("a flat patch is a safetensors file", expected="a name in .safetensors", found=target.name)
    sides = open_checkpoint(base), open_checkpoint(tuned)
    require_same_tensors(*sides, "a flat patch")
    check_new(target)
    total = sum(tensor.nbytes for side in sides for tensor in side.tensors.values())
    with ExitStack() as stack:
        spools = [StagedFile(target.with_name(target.name + part)) for part in (INDICES, VALUES)]
        indices, values = map(stack.enter_context, spools)
        with stage(listener, "making the patch", total, "bytes") as told:
            making = _Making(sides, dense_rest, threads_for(threads), told, indices, values)
            entries = making.entries()
        staged = stack.enter_context(StagedFile(target))
        with open_shards("pread") as shards:
            whole = [
                Entry(name, sides[1].tensors[name].dtype, sides[1].tensors[name].shape, making.whole(shards, name))
                for name in making.dense
            ]
            write_safetensors(staged, [*entries, *whole], making.metadata())
        staged.commit()
        return shipped(sides, len(making.shapes), making.changed, making.changed_bytes, 1, staged.tell())


class _Making:
    """One flat patch: indices and values go to files without a name, from which they are copied behind the header."""

    def __init__(
        self,
        sides: tuple[Checkpoint, Checkpoint],
        dense_rest: bool,
        threads: int,
        told: Stage,
        indices: StagedFile,
        values: StagedFile,
    ) -> None:
        self._sides, self._dense_rest, self._threads, self._told = sides, dense_rest, threads, told
        self._indices, self._values = indices, values
        self._stop = threading.Event()
        self._digests: dict[str, list[TensorDigest]] = {}
        self._found: dict[str, list[str]] = {}
        self.shapes: dict[str, list[int]] = {}
        self.dense: list[str] = []
        self.changed = self.changed_bytes = 0

    def entries(self) -> list[Entry]:
        """Spool what changed; an entry each of the indices and the values of a tensor says where they are."""
        entries: list[Entry] = []
        starts, count, problem = (0, 0), 0, None
        for tensor, place, found in compared(
            self._sides, list(self._sides[1].tensors), self._work, self._threads, self._stop, self._told
        ):
            if place == 0:
                starts, count, problem = (self._indices.tell(), self._values.tell()), 0, None
            if found is not None:
                at, values, changed_bytes, wrong = found
                count += at.size
                self.changed_bytes += changed_bytes
                problem = problem or wrong
                if problem is None:
                    self._indices.write(at.view(np.uint8).data)
                    self._values.write(values.view(np.uint8).data)
            if place == blocks_in(tensor) - 1 and count:
                self.changed += count
                self.shapes[tensor.name] = list(tensor.shape)
                if problem is None:
                    entries += self._entries(tensor, starts, count)
                else:
                    self._send_whole(tensor, problem, starts)
            for spool in (self._indices, self._values):
                spool.check()
        return entries

    def _entries(self, tensor: TensorInfo, starts: tuple[int, int], count: int) -> list[Entry]:
        index = _index_of(tensor)
        sizes = count * index.itemsize, count * Coding.of(tensor.dtype).width
        return [
            Entry(tensor.name + part, dtype, (count,), spooled(spool, start, size))
            for part, dtype, spool, start, size in zip(
                (INDICES, VALUES),
                (f"I{8 * index.itemsize}", tensor.dtype),
                (self._indices, self._values),
                starts,
                sizes,
                strict=True,
            )
        ]

    def _send_whole(self, tensor: TensorInfo, problem: str, starts: tuple[int, int]) -> None:
        if not self._dense_rest:
            raise PatchError(
                f"engines take no sparse patch of this tensor: {problem}",
                file=self._sides[1].path,
                tensor=tensor.name,
                expected="new values of a floating dtype, none of them NaN",
                found=tensor.dtype,
                hint="--dense-rest sends such tensors whole",
            )
        self.dense.append(tensor.name)
        for spool, start in zip((self._indices, self._values), starts, strict=True):
            spool.seek(start)
            spool.truncate(start)

    def whole(self, shards: Any, name: str) -> Any:
        """Returns the bytes of a tensor of the tuned side, piece by piece."""
        tensor = self._sides[1].tensors[name]
        return lambda: (block.data for block in blocks_of(shards, tensor, BLOCK_CODES))

    def metadata(self) -> dict[str, str]:
        """What the file says about itself."""
        digests = [{name: self._found[name][which] for name in self._sides[1].tensors} for which in (0, 1)]
        facts = {"shapes": self.shapes, "before": digests[0], "after": digests[1]}
        return {
            "format": FLAT_FORMAT,
            "version": FLAT_VERSION,
            **{key: json.dumps(value, ensure_ascii=False, separators=(",", ":")) for key, value in facts.items()},
        }

    def _work(
        self, tensor: TensorInfo, place: int, before: Bytes, after: Bytes
    ) -> tuple[Any, Any, int, str | None] | None:
        """Where values of a block changed, their new values, in how many bytes, and why not to send them; or None."""
        self._digest(tensor, place, before, after)
        code = f"<u{Coding.of(tensor.dtype).width}"
        new = after.view(code)
        at = np.flatnonzero(before.view(code) != new)
        if not at.size:
            return None
        values, problem = new[at], None
        sign = 1 << (8 * values.itemsize - 1)
        if DTYPES[tensor.dtype].kind is not Kind.FLOAT:
            problem = "its dtype is not a floating one"
        elif np.any((values & values.dtype.type(sign - 1)) >= stored_format(tensor.dtype).nan):
            problem = "a value becomes NaN"
        return (
            (at + place * BLOCK_CODES).astype(_index_of(tensor)),
            values,
            int(np.count_nonzero(before != after)),
            problem,
        )

    def _digest(self, tensor: TensorInfo, place: int, *blocks: Bytes) -> None:
        digests = self._digests.setdefault(tensor.name, [TensorDigest(self._stop) for _ in blocks])
        for digest, block in zip(digests, blocks, strict=True):
            digest.add(place, block)
        if place == blocks_in(tensor) - 1:
            self._found[tensor.name] = [digest.value() for digest in self._digests.pop(tensor.name)]


def _index_of(tensor: TensorInfo) -> np.dtype[Any]:
    return np.dtype("<i4" if tensor.numel <= 1 << 31 else "<i8")
