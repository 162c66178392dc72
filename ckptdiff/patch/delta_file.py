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
import json
import math
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from itertools import accumulate
from json.encoder import encode_basestring_ascii as quoted
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import DTYPES
from ckptdiff.checkpoint.regular_file import open_regular, read_bytes
from ckptdiff.checkpoint.strict_json import JsonProblemError, parse_object
from ckptdiff.errors import CheckpointError, PatchError
from ckptdiff.files.staged import StagedFile
from ckptdiff.patch.coded_block import MOST_NUMBERS, DamagedBlockError, Steps, apply_block, read_block
from ckptdiff.patch.delta import BLOCK_CODES, Blob, Delta, TensorDelta, TunedFile
from ckptdiff.patch.link import FETCH_AGAIN
from ckptdiff.patch.small_tensors import apply_stored

__all__ = ["SIGNATURE", "DeltaFile", "IndexText", "is_delta", "open_delta", "write_blob", "write_index"]

SIGNATURE = b"CKPTDLT1"
LEVEL = 6
"""Of zlib, for headers and indexes."""
_FOOTER = struct.Struct("<8sQQQ32s")
_MOST_INDEX = 1 << 30
"""Bytes of the largest index that is read: a million tensors take a third of it."""
_PLENTY, _MOST_TIMES = 16 << 20, 100
"""It deflates to less than a hundredth only where it lists unchanged blocks; a million million codes have a million."""
_MOST_BLOB = 200_000_000
"""A safetensors header has 100 MB at most."""
_OF_STATE = {"same": (0, 1, 1), "changed": (1, 1, 1), "whole": (1, 0, 1), "lost": (0, 0, 0)}
"""Of a tensor: whether it has blocks, and a digest before and after."""


class IndexText:
    """The index of a delta as JSON, compressed while its tensors become known.

    Parameters
    ----------
    delta : Delta
        Its tensors are not looked at.
    """

    def __init__(self, delta: Delta) -> None:
        document = {
            "made_by": delta.made_by,
            "base": {"path": delta.base, "files": [list(one) for one in delta.base_files]},
            "tuned": {
                "path": delta.tuned,
                "single": delta.single,
                "files": [[one.name, one.size, *astuple(one.header)] for one in delta.files],
                "index": None if delta.index is None else [delta.index[0], *astuple(delta.index[1])],
            },
            "block": BLOCK_CODES,
            "tensors": [],
        }
        self._deflate, self._stored, self._size, self._between = zlib.compressobj(LEVEL), list[bytes](), 0, ""
        self._append(json.dumps(document, ensure_ascii=True, separators=(",", ":")).removesuffix("]}"))

    def add(self, tensors: Sequence[TensorDelta]) -> None:
        """Say what becomes of further tensors."""
        if tensors:
            self._append(self._between + ",".join(map(_entry, tensors)))
            self._between = ","

    def write(self, staged: StagedFile) -> None:
        """Append the index and the footer to a file that holds all blocks."""
        self._append("]}")
        stored, offset = b"".join([*self._stored, self._deflate.flush()]), staged.tell()
        staged.write(stored)
        staged.write(_FOOTER.pack(SIGNATURE, offset, len(stored), self._size, hashlib.sha256(stored).digest()))
        staged.check()

    def _append(self, text: str) -> None:
        self._stored.append(self._deflate.compress(text.encode()))
        self._size += len(text)


def _entry(one: TensorDelta) -> str:
    """A tensor's object in the index; a tenth of the time that JSON's own writer takes for one of so many keys."""
    before, after = ("null" if digest is None else quoted(digest) for digest in (one.before, one.after))
    shape, sizes = (",".join(map(str, numbers)) for numbers in (one.shape, one.sizes))
    return (
        f'{{"name":{quoted(one.name)},"state":"{one.state}","dtype":"{one.dtype}","shape":[{shape}],"file":{one.file},'
        f'"before":{before},"after":{after},"changed":{one.changed},"offset":{one.offset},"sizes":[{sizes}],'
        f'"replaces":{"true" if one.replaces else "false"}}}'
    )


def write_index(staged: StagedFile, delta: Delta) -> None:
    """Append the index and the footer to a file that holds all blocks."""
    index = IndexText(delta)
    index.add([*delta.tensors.values()])
    index.write(staged)


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
            return _delta(parse_object(self._inflated(raw, size)), offset), digest.hex()
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


def _delta(index: Mapping[str, Any], end: int) -> Delta:
    """The index, checked: what it names lies within the file, and its files within their folder."""
    if index["block"] != BLOCK_CODES:
        raise ValueError(f"blocks of {index['block']} codes")
    base, tuned = index["base"], index["tuned"]
    files = tuple(TunedFile(_inside(name), _whole(size), _blob(blob, end)) for name, size, *blob in tuned["files"])
    named = None
    if tuned["index"] is not None:
        name, *blob = tuned["index"]
        named = _inside(name), _blob(blob, end)
    if len({one.name for one in files}) != len(files) or tuned["single"] not in (True, False):
        raise ValueError("a file named twice")
    tensors: dict[str, TensorDelta] = {}
    for entry in index["tensors"]:
        tensor = TensorDelta(
            name=_text(entry["name"]),
            state=entry["state"],
            dtype=_text(entry["dtype"]),
            shape=tuple(map(_whole, entry["shape"])),
            file=int(entry["file"]),
            before=entry["before"],
            after=entry["after"],
            changed=_whole(entry["changed"]),
            offset=_whole(entry["offset"]),
            sizes=tuple(map(_whole, entry["sizes"])),
            replaces=bool(entry["replaces"]),
        )
        _check_tensor(tensor, len(files), end)
        if tensor.name in tensors:
            raise ValueError(f"{tensor.name} twice")
        tensors[tensor.name] = tensor
    held = [0] * len(files)
    for tensor in tensors.values():
        if tensor.state != "lost":
            held[tensor.file] += tensor.nbytes
    for one, size in zip(files, held, strict=True):
        if one.header.size + size != one.size:
            raise ValueError(f"{one.name} has {one.size} bytes, its tensors {size}")
    return Delta(
        made_by=_text(index["made_by"]),
        base=_text(base["path"]),
        tuned=_text(tuned["path"]),
        base_files=tuple((_text(name), _whole(size), _text(digest)) for name, size, digest in base["files"]),
        single=tuned["single"],
        files=files,
        index=named,
        tensors=tensors,
    )


def _check_tensor(tensor: TensorDelta, files: int, end: int) -> None:
    bits = math.prod(tensor.shape) * DTYPES[tensor.dtype].bits
    coded, before, after = _OF_STATE[tensor.state]
    if bits % 8 or bits >= 1 << 63 or tensor.coding.width * tensor.codes != tensor.nbytes:
        raise ValueError(f"{tensor.name} has {bits} bits")
    if len(tensor.sizes) != (tensor.blocks if coded else 0) or tensor.offset + tensor.stored > end:
        raise ValueError(f"{tensor.name} has {len(tensor.sizes)} blocks at {tensor.offset}")
    if tensor.sizes and max(tensor.sizes) > BLOCK_CODES * tensor.coding.width + MOST_NUMBERS:
        raise ValueError(f"{tensor.name} has a block of {max(tensor.sizes)} bytes")
    if isinstance(tensor.before, str) != before or isinstance(tensor.after, str) != after:
        raise ValueError(f"{tensor.name} lacks a digest")
    if not 0 <= tensor.file < files if after else tensor.file != -1:
        raise ValueError(f"{tensor.name} is in file {tensor.file}")


def _blob(numbers: Sequence[Any], end: int) -> Blob:
    offset, stored, size = map(_whole, numbers)
    if offset + stored > end:
        raise ValueError("bytes beyond the blocks")
    return Blob(offset, stored, size)


def _inside(name: Any) -> str:
    """A file name that stays in its folder."""
    path = PurePosixPath(_text(name))
    if (
        path.is_absolute()
        or not path.parts
        or ".." in path.parts
        or "\\" in name
        or "\0" in name
        or Path(name).is_absolute()
    ):
        raise ValueError(f"a file {name!r} outside its folder")
    return str(path)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is no size")
    return value
