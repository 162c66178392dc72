"""Write the index of an exact weight delta as JSON, and read it back: thousands of tensors in one go."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from itertools import chain
from json.encoder import encode_basestring_ascii as quoted
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any

from ckptdiff.checkpoint import DTYPES
from ckptdiff.patch.coded_block import MOST_NUMBERS
from ckptdiff.patch.delta import BLOCK_CODES, Blob, Delta, TensorDelta, TunedFile, extent_of

__all__ = ["LEVEL", "IndexText", "delta_of"]

LEVEL = 3
"""Of zlib, for headers and indexes: half of the time of level 6, and a tenth more of them, which are mostly digests."""
_OF_STATE = {"same": (0, 1, 1), "changed": (1, 1, 1), "whole": (1, 0, 1), "lost": (0, 0, 0)}
"""Of a tensor: whether it has blocks, and a digest before and after."""
_FACTS = itemgetter(
    "name", "state", "dtype", "shape", "file", "before", "after", "changed", "offset", "sizes", "replaces"
)


class IndexText:
    """The index of a delta, compressed while its tensors become known.

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

    def add(self, tensors: Iterable[TensorDelta]) -> None:
        """Say what becomes of further tensors."""
        if text := ",".join(map(_entry, tensors)):
            self._append(self._between + text)
            self._between = ","

    def finish(self) -> tuple[bytes, int]:
        """The zlib stream, and how many bytes of text it holds."""
        self._append("]}")
        return b"".join([*self._stored, self._deflate.flush()]), self._size

    def _append(self, text: str) -> None:
        self._stored.append(self._deflate.compress(text.encode()))
        self._size += len(text)


def _entry(one: TensorDelta) -> str:
    """A tensor's object in the index, which JSON's own writer would take five times as long for."""
    before = "null" if one.before is None else quoted(one.before)
    after = "null" if one.after is None else quoted(one.after)
    shape, sizes = ",".join(map(str, one.shape)), ",".join(map(str, one.sizes))
    return (
        f'{{"name":{quoted(one.name)},"state":"{one.state}","dtype":"{one.dtype}","shape":[{shape}],"file":{one.file},'
        f'"before":{before},"after":{after},"changed":{one.changed},"offset":{one.offset},"sizes":[{sizes}],'
        f'"replaces":{"true" if one.replaces else "false"}}}'
    )


def delta_of(index: Mapping[str, Any], end: int) -> Delta:
    """Read an index whose blocks end at a byte of the file.

    Everything is checked: what it names lies within the file, and its files within their folder.

    Raises
    ------
    KeyError, TypeError, ValueError, IndexError
        It says what cannot be.
    """
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
    tensors = _tensors(index["tensors"], len(files), end)
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


def _tensors(entries: Sequence[Any], files: int, end: int) -> dict[str, TensorDelta]:
    """The tensors of an index; what type each fact has is looked at for all of them together."""
    rows = [*map(_FACTS, entries)]
    if not rows:
        return {}
    names, _, dtypes, shapes, places, _, _, changed, offsets, sizes, replaces = zip(*rows, strict=True)
    _require(str, chain(names, dtypes))
    _require(list, chain(shapes, sizes))
    _require(bool, replaces)
    _require(int, chain(places, changed, offsets, *shapes, *sizes))
    if min(chain(changed, offsets, *shapes, *sizes)) < 0:
        raise ValueError("a negative size")
    tensors = {
        name: TensorDelta(
            name,
            state,
            dtype,
            dims,
            file,
            before,
            after,
            codes,
            extent_of(dtype, dims),
            offset,
            tuple(stored),
            replaced,
        )
        for (name, state, dtype, _, file, before, after, codes, offset, stored, replaced), dims in zip(
            rows, map(tuple, shapes), strict=True
        )
    }
    if len(tensors) < len(rows):
        raise ValueError("a tensor twice")
    for tensor in tensors.values():
        _check_tensor(tensor, files, end)
    return tensors


def _require(kind: type, values: Iterable[Any]) -> None:
    """Refuse what has not just this type."""
    strange = {*map(type, values)} - {kind}
    if strange:
        raise TypeError(f"{strange.pop().__name__} in place of {kind.__name__}")


def _check_tensor(tensor: TensorDelta, files: int, end: int) -> None:
    name, state, dtype, shape, file, before, after, _, extent, offset, sizes, _ = tensor
    coded, has_before, has_after = _OF_STATE[state]
    nbytes, coding, codes, blocks = extent
    if coding.width * codes != nbytes or nbytes >= 1 << 60 or math.prod(shape) * DTYPES[dtype].bits % 8:
        raise ValueError(f"{name} has a shape of {list(shape)}")
    if len(sizes) != (blocks if coded else 0) or offset + sum(sizes) > end:
        raise ValueError(f"{name} has {len(sizes)} blocks at {offset}")
    if sizes and max(sizes) > BLOCK_CODES * coding.width + MOST_NUMBERS:
        raise ValueError(f"{name} has a block of {max(sizes)} bytes")
    if isinstance(before, str) != has_before or isinstance(after, str) != has_after:
        raise ValueError(f"{name} lacks a digest")
    if not 0 <= file < files if has_after else file != -1:
        raise ValueError(f"{name} is in file {file}")


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
