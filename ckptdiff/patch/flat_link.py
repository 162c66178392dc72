"""Read a flat patch, as ``make_flat.py`` writes it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ckptdiff.checkpoint import DTYPES, Shard, TensorInfo, read_header
from ckptdiff.checkpoint.regular_file import open_regular, read_bytes
from ckptdiff.errors import CheckpointError, PatchError, first_few
from ckptdiff.patch.coded_block import Coding
from ckptdiff.patch.delta import BLOCK_CODES, TensorDelta
from ckptdiff.patch.link import FETCH_AGAIN, Apply, GivenSide, StreamLink, scattered
from ckptdiff.patch.make_flat import FLAT_FORMAT, FLAT_VERSION, INDICES, VALUES

__all__ = ["FlatPatch", "FlatTensor", "changes_of_flat", "link_of_flat", "read_flat"]

_INDEX_DTYPES = {"I32": "<i4", "I64": "<i8"}


@dataclass(frozen=True, slots=True)
class FlatTensor:
    """The changes of one tensor."""

    shape: tuple[int, ...]
    indices: TensorInfo | None
    """None of a tensor that is there as a whole."""
    values: TensorInfo


@dataclass(frozen=True, slots=True)
class FlatPatch:
    """A flat patch, from its header."""

    shard: Shard
    tensors: Mapping[str, FlatTensor]
    before: Mapping[str, str]
    after: Mapping[str, str]
    """Digests of every tensor of the checkpoint."""


def read_flat(path: str | os.PathLike[str]) -> FlatPatch:
    """Read the header of a flat patch.

    Raises
    ------
    PatchError
        It is none, or its parts do not belong together.
    CheckpointError
        It cannot be read, or is no safetensors file.
    """
    shard, held = read_header(path)
    facts, entries = shard.metadata, {one.name: one for one in held}
    if (facts.get("format"), facts.get("version")) != (FLAT_FORMAT, FLAT_VERSION):
        found = f"{facts.get('format', 'none')}, version {facts.get('version', 'none')}"
        raise _wrong(shard, "not a flat patch", f"format {FLAT_FORMAT}, version {FLAT_VERSION}", found)
    try:
        shapes, before, after = (dict(json.loads(facts[key])) for key in ("shapes", "before", "after"))
        whole = all(type(one) is int and one >= 0 for shape in shapes.values() for one in shape)
        text = all(isinstance(one, str) for digests in (before, after) for one in digests.values())
        if not whole or not text or before.keys() != after.keys() or not shapes.keys() <= after.keys():
            raise ValueError("shapes or digests that cannot be")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _wrong(shard, "the metadata of the patch are damaged", "shapes, before and after", repr(error)) from error
    tensors: dict[str, FlatTensor] = {}
    for name, shape in shapes.items():
        if name in entries:
            tensors[name] = FlatTensor(tuple(shape), None, entries.pop(name))
        elif name + INDICES in entries and name + VALUES in entries:
            tensors[name] = FlatTensor(tuple(shape), entries.pop(name + INDICES), entries.pop(name + VALUES))
        else:
            raise _wrong(shard, "a tensor of the metadata is not there", "its indices and values", "neither", name)
        _require_match(shard, name, tensors[name])
    if entries:
        raise _wrong(shard, "a tensor is not in the metadata", "its shape", "none", min(entries))
    return FlatPatch(shard, tensors, before, after)


def _require_match(shard: Shard, name: str, tensor: FlatTensor) -> None:
    """Refuse indices and values that do not belong together."""
    values, indices, numel = tensor.values, tensor.indices, math.prod(tensor.shape)
    if indices is None:
        if values.shape != tensor.shape:
            raise _wrong(shard, "a tensor has another shape than it says", list(tensor.shape), list(values.shape), name)
        return
    right = indices.dtype in _INDEX_DTYPES and len(indices.shape) == 1 and values.shape == indices.shape
    if not right or DTYPES[values.dtype].bits % 8 or DTYPES[values.dtype].bits > 64 or indices.numel > numel:
        found = f"indices {indices.dtype} {list(indices.shape)}, values {values.dtype} {list(values.shape)}"
        expected = f"I32 or I64, and as many values, at most {numel}"
        raise _wrong(shard, "indices and values do not belong together", expected, found, name)


@contextmanager
def link_of_flat(path: str | os.PathLike[str], base: GivenSide, before: Sequence[StreamLink]) -> Iterator[StreamLink]:
    """Open a flat patch as a link of a chain that begins with a base.

    Raises
    ------
    PatchError
        As :func:`read_flat`; or the base has other tensors.
    """
    del before  # their digests tell whether it follows
    flat = read_flat(path)
    kinds = {name: (one.values.dtype, one.shape) for name, one in flat.tensors.items()}
    found = {name: (one.dtype, one.shape) for name, one in base.tensors.items()}
    strange = [*(flat.after.keys() ^ found.keys()), *(name for name in kinds if kinds[name] != found.get(name))]
    if strange:
        raise PatchError(
            "the base is not the one that the patch was made for",
            file=flat.shard.path,
            expected=f"the tensors that the patch names, in {base.path}",
            found=f"{len(strange)} that differ: {first_few(sorted(strange))}",
        )
    with open_regular(flat.shard.path) as (descriptor, _):
        begin = {name: _begin(flat, one, descriptor) for name, one in flat.tensors.items()}
        digests = {name: (flat.before[name], flat.after[name]) for name in base.tensors}
        yield StreamLink(flat.shard.path, flat.shard.header_sha256, base, digests, begin)
        now = os.fstat(descriptor)
        if (now.st_size, now.st_mtime_ns) != (flat.shard.size, flat.shard.mtime_ns):
            raise CheckpointError("the patch changed while it was read", file=flat.shard.path)


def _begin(flat: FlatPatch, one: FlatTensor, descriptor: int) -> Callable[[TensorDelta], Iterator[Apply]]:
    return lambda tensor: _changes(flat, one, tensor, descriptor)


def _changes(flat: FlatPatch, one: FlatTensor, tensor: TensorDelta, descriptor: int) -> Iterator[Apply]:
    if one.indices is None:
        for _, new in changes_of_flat(flat, tensor.name, descriptor):
            yield partial(np.copyto, src=new.view(np.uint8))
        return
    for at, new in changes_of_flat(flat, tensor.name, descriptor):
        yield partial(_set, at, new)


def changes_of_flat(flat: FlatPatch, name: str, descriptor: int) -> Iterator[tuple[Any, Any]]:
    """Read the changes of a tensor.

    Yields
    ------
    int64 array, unsigned array
        Of each block of its codes which change, counted from the block's first, and the new codes.
    """
    one = flat.tensors[name]
    width = Coding.of(one.values.dtype).width
    codes = math.prod(one.shape) * DTYPES[one.values.dtype].bits // 8 // width
    values, code = _reader(one.values, descriptor), np.dtype(f"<u{width}")
    if one.indices is None:
        for start in range(0, codes, BLOCK_CODES):
            numel = min(BLOCK_CODES, codes - start)
            yield np.arange(numel), values(numel * width).view(code)
        return
    kind = np.dtype(_INDEX_DTYPES[one.indices.dtype])
    indices = _reader(one.indices, descriptor)
    for at, new in scattered(
        lambda some: indices(some * kind.itemsize).view(kind),
        lambda some: values(some * width),
        one.indices.numel,
        codes,
        BLOCK_CODES,
        lambda expected, found: _wrong(flat.shard, "an index of the patch cannot be", expected, found, name),
    ):
        yield at, new.view(code)


def _set(at: Any, new: Any, codes: Any) -> None:
    codes.view(new.dtype)[at] = new


def _reader(tensor: TensorInfo, descriptor: int) -> Callable[[int], Any]:
    """Returns the next so many bytes of a tensor."""
    place = tensor.start

    def read(size: int) -> Any:
        nonlocal place
        place += size
        return np.frombuffer(read_bytes(descriptor, size, place - size, tensor.shard.path), np.uint8)

    return read


def _wrong(shard: Shard, problem: str, expected: object, found: object, tensor: str | None = None) -> PatchError:
    return PatchError(problem, file=shard.path, tensor=tensor, expected=expected, found=found, hint=FETCH_AGAIN)
