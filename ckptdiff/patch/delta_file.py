"""Write and read the file of an exact weight delta: a signature, coded blocks, an index, and a footer.

| bytes | what |
|---|---|
| 8 | ``CKPTDLT1`` |
| ... | coded blocks (``coded_block.py``) and, as zlib streams, the headers and the index of the tuned side's files |
| ... | the index, a zlib stream of JSON in UTF-8 |
| 64 | ``CKPTDLT1``; offset, stored size and size of the index (uint64, little-endian); SHA-256 of its stored bytes |

The index says everything but values: of both sides their files, of each tensor its dtype, its shape, the digests
(xxh3-128) of its bytes before and after, where its first block lies, and the size of each. It stands behind the blocks,
so that these are written as they come.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint.regular_file import open_regular, read_bytes
from ckptdiff.checkpoint.strict_json import JsonProblemError, parse_object
from ckptdiff.errors import CheckpointError, PatchError
from ckptdiff.files.staged import StagedFile
from ckptdiff.patch.coded_block import DamagedBlockError, Steps, apply_block, read_block
from ckptdiff.patch.delta import BLOCK_CODES, Blob, Delta, TensorDelta
from ckptdiff.patch.delta_index import LEVEL, IndexText, delta_of
from ckptdiff.patch.link import FETCH_AGAIN
from ckptdiff.patch.small_tensors import apply_stored

__all__ = ["SIGNATURE", "DeltaFile", "is_delta", "open_delta", "write_blob", "write_index"]

SIGNATURE = b"CKPTDLT1"
_FOOTER = struct.Struct("<8sQQQ32s")
_MOST_INDEX = 1 << 30
"""Bytes of the largest index that is read: a million tensors take a third of it."""
_PLENTY, _MOST_TIMES = 16 << 20, 100
"""It deflates to less than a hundredth only where it lists unchanged blocks; a million million codes have a million."""
_MOST_BLOB = 200_000_000
"""A safetensors header has 100 MB at most."""


def write_index(staged: StagedFile, index: IndexText) -> None:
    """Append the index and the footer to a file that holds all blocks."""
    (stored, size), offset = index.finish(), staged.tell()
    staged.write(stored)
    staged.write(_FOOTER.pack(SIGNATURE, offset, len(stored), size, hashlib.sha256(stored).digest()))
    staged.check()


def write_blob(staged: StagedFile, data: bytes) -> Blob:
    """Append a zlib stream."""
    stored, offset = zlib.compress(data, LEVEL), staged.tell()
    staged.write(stored)
    staged.check()
    return Blob(offset, len(stored), len(data))


class DeltaFile:
    """An open delta; safe to use from many threads.

    Attributes
    ----------
    path : str
    size : int
        Bytes of the file.
    identity : str
        SHA-256 of its index, which tells two deltas apart.
    delta : Delta
    """

    repeatable = False

    def __init__(self, path: str, descriptor: int, size: int) -> None:
        self.path, self.size, self._descriptor = path, size, descriptor
        self._starts: dict[str, list[int]] = {}
        self.delta, self.identity = self._index()

    def block(self, tensor: TensorDelta, place: int) -> bytes:
        """Stored bytes of one block of a tensor."""
        starts = self._starts.get(tensor.name)
        if starts is None:
            starts = self._starts[tensor.name] = list(accumulate(tensor.sizes, initial=tensor.offset))
        return read_bytes(self._descriptor, tensor.sizes[place], starts[place], self.path)

    def change(self, tensor: TensorDelta, place: int) -> Steps | NDArray[np.uint8] | None:
        """What happens to one block of a tensor; steps are valid until the next is read in this thread.

        Raises PatchError if the block is damaged.
        """
        if not tensor.sizes:
            return None
        numel = min(BLOCK_CODES, tensor.codes - place * BLOCK_CODES)
        try:
            return read_block(self.block(tensor, place), numel, tensor.coding)
        except DamagedBlockError as error:
            raise self.damaged("a block of the patch is damaged", "what ckptdiff writes", error, tensor.name) from error

    def apply(self, tensor: TensorDelta, place: int, codes: NDArray[np.uint8], stop: threading.Event) -> None:
        """Make the new bytes of one block of a tensor of the old ones, in place."""
        del stop  # nothing is waited for
        apply_block(codes, self.change(tensor, place), tensor.coding)

    def apply_small(
        self, tensors: Sequence[TensorDelta], starts: Sequence[int], codes: NDArray[np.uint8], stop: threading.Event
    ) -> None:
        """Do so with several tensors of one block, each of which begins at one byte of the codes."""
        ones = [(tensor, start) for tensor, start in zip(tensors, starts, strict=True) if tensor.sizes]
        for place in apply_stored(codes, ones, self._descriptor, self.path):
            tensor, start = ones[place]
            old = codes[start : start + tensor.nbytes]
            new = old.copy()  # at an address that suits its codes
            self.apply(tensor, 0, new, stop)
            old[:] = new

    def header(self, file: int) -> bytes:
        """The first bytes of a file of the tuned side."""
        return self.blob(self.delta.files[file].header)

    def side_index(self) -> tuple[str, bytes] | None:
        """Name and bytes of the tuned side's ``index.json``."""
        return None if self.delta.index is None else (self.delta.index[0], self.blob(self.delta.index[1]))

    def blob(self, blob: Blob) -> bytes:
        """What a zlib stream of the file holds."""
        if blob.size > _MOST_BLOB:
            raise self.damaged("a header is larger than any", f"at most {_MOST_BLOB} bytes", blob.size)
        return self._inflated(read_bytes(self._descriptor, blob.stored, blob.offset, self.path), blob.size)

    def damaged(self, problem: str, expected: object, found: object, tensor: str | None = None) -> PatchError:
        """An error that says that the file is damaged."""
        return PatchError(problem, file=self.path, tensor=tensor, expected=expected, found=found, hint=FETCH_AGAIN)

    def _inflated(self, stored: bytes, size: int) -> bytes:
        inflate = zlib.decompressobj()
        try:
            data = inflate.decompress(stored, size + 1)
        except zlib.error as error:
            raise self.damaged("a part of the patch is damaged", "a zlib stream", error) from error
        if len(data) != size or not inflate.eof or inflate.unused_data:
            raise self.damaged("a part of the patch is damaged", f"{size} bytes", "another number")
        return data

    def _index(self) -> tuple[Delta, str]:
        start = read_bytes(self._descriptor, min(self.size, len(SIGNATURE)), 0, self.path)
        if start != SIGNATURE and start[:-1] == SIGNATURE[:-1]:
            raise PatchError(
                "the patch is of another version of the format",
                file=self.path,
                expected=repr(SIGNATURE),
                found=repr(start),
                hint="upgrade ckptdiff",
            )
        if start != SIGNATURE:
            raise PatchError("not a patch", file=self.path, expected=repr(SIGNATURE), found=repr(start))
        if self.size < len(SIGNATURE) + _FOOTER.size:
            raise self.damaged("the patch is cut short", "an index and a footer", f"{self.size} bytes")
        end = self.size - _FOOTER.size
        signature, offset, stored, size, digest = _FOOTER.unpack(
            read_bytes(self._descriptor, _FOOTER.size, end, self.path)
        )
        if signature != SIGNATURE or offset + stored != end or size > min(_MOST_INDEX, _PLENTY + _MOST_TIMES * stored):
            raise self.damaged("the patch is cut short or damaged", "a footer at its end", "other bytes")
        raw = read_bytes(self._descriptor, stored, offset, self.path)
        if hashlib.sha256(raw).digest() != digest:
            raise self.damaged("the index of the patch is damaged", "the SHA-256 in its footer", "another")
        try:
            return delta_of(parse_object(self._inflated(raw, size)), offset), digest.hex()
        except JsonProblemError as error:
            raise self.damaged(f"the index of the patch {error.problem}", error.expected, error.found) from error
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self.damaged("the index of the patch says what cannot be", "what ckptdiff writes", error) from error


def is_delta(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as an exact delta does; raises CheckpointError if it cannot be read."""
    name = os.fspath(path)
    with open_regular(name) as (descriptor, status):
        return read_bytes(descriptor, min(len(SIGNATURE), status.st_size), 0, name) == SIGNATURE


@contextmanager
def open_delta(path: str | os.PathLike[str]) -> Iterator[DeltaFile]:
    """Open a delta and read its index.

    Raises
    ------
    PatchError
        It is none, or is damaged, or names files outside its folder.
    CheckpointError
        It cannot be read.
    """
    name = os.fspath(path)
    with open_regular(name) as (descriptor, status):
        yield DeltaFile(name, descriptor, status.st_size)
        now = os.fstat(descriptor)
        if (now.st_size, now.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
            raise CheckpointError("the patch changed while it was read", file=name)
