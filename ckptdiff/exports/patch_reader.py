"""Read a sparse patch back: what it changes, and its indices and values piece by piece."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import DTYPES, Shard, TensorInfo, read_header
from ckptdiff.checkpoint.blocks import blocks_of
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.errors import PatchError
from ckptdiff.exports.patch import PATCH_FORMAT
from ckptdiff.measure.partial import BLOCK

_INDICES, _VALUES = ".indices", ".values"
_INDEX_DTYPES = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}
_DAMAGED = "the download or copy may be incomplete: fetch it again, or export it again"


@dataclass(frozen=True, slots=True)
class TensorPatch:
    """The changes of one tensor."""

    name: str
    """Of the tensor in the base."""
    shape: tuple[int, ...]
    indices: TensorInfo
    values: TensorInfo
    """Where they lie in the patch: as many of the one as of the other."""

    @property
    def count(self) -> int:
        """Coordinates that it sets."""
        return self.indices.numel


@dataclass(frozen=True, slots=True)
class Patch:
    """A patch, from its header."""

    shard: Shard
    """The file."""
    tensors: Mapping[str, TensorPatch]
    """By the tensor's name."""
    rule: str
    compare: str
    """Which changes it was made of, as ``ckptdiff diff`` names them."""
    base: tuple[tuple[str, int], ...]
    """Header hash and size of each shard of the base that it was made for, sorted."""


@dataclass(frozen=True, slots=True)
class BlockChange:
    """Changes inside one block of a tensor."""

    block: int
    """Which one."""
    offsets: NDArray[np.signedinteger[Any]]
    """Coordinates in the block, ascending."""
    values: NDArray[np.unsignedinteger[Any]]
    """What is stored there from now on, bit for bit; valid until the next change is asked for."""


def open_patch(path: str | os.PathLike[str]) -> Patch:
    """Read the header of a patch; no index and no value is read.

    Raises CheckpointError if the file cannot be read or is no safetensors file, and PatchError if it is no patch, or
    one whose parts do not belong together.
    """
    shard, tensors = read_header(path)
    if shard.metadata.get("format") != PATCH_FORMAT:
        raise PatchError(
            "not a patch",
            file=shard.path,
            expected=f"format {PATCH_FORMAT} in the metadata",
            found=shard.metadata.get("format", "none"),
            hint="ckptdiff mask export RUN.h5 --layout patch writes one",
        )
    try:
        shapes = {name: tuple(map(_size, shape)) for name, shape in json.loads(shard.metadata["shapes"]).items()}
        base = sorted((str(one["header_sha256"]), index(one["size"])) for one in json.loads(shard.metadata["base"]))
        rule, compare = shard.metadata["rule"], shard.metadata["compare"]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise PatchError(
            "the metadata of the patch are damaged", file=shard.path, found=repr(error), hint=_DAMAGED
        ) from error
    entries = {tensor.name: tensor for tensor in tensors}
    keys = [name + part for name in shapes for part in (_INDICES, _VALUES)]
    if strange := set(keys) ^ set(entries):
        key = min(strange)
        raise PatchError(
            "the metadata of the patch name other tensors than it holds",
            file=shard.path,
            tensor=key,
            expected="NAME.indices and NAME.values of each NAME in shapes",
            found="it is not there" if key in keys else "its shape is not there",
            hint=_DAMAGED,
        )
    patches = {
        name: TensorPatch(name, shape, entries[name + _INDICES], entries[name + _VALUES])
        for name, shape in shapes.items()
    }
    for patch in patches.values():
        _require_match(patch)
    return Patch(shard, patches, rule, compare, tuple(base))


def _size(value: Any) -> int:
    size = index(value)
    if size < 0:
        raise ValueError("a negative size")
    return size


def changes_of(shards: OpenShards, patch: TensorPatch, block: int = BLOCK) -> Iterator[BlockChange]:
    """Yield the changes of a tensor in the order of its blocks, `block` indices at a time; several may be of one block.

    Raises PatchError for an index that lies outside the tensor or is not above the one before, and CheckpointError if
    the patch cannot be read or changes while it is read.
    """
    code = np.dtype(f"<u{DTYPES[patch.values.dtype].bits // 8}")
    position, last = 0, -1
    stored = zip(blocks_of(shards, patch.indices, block), blocks_of(shards, patch.values, block), strict=True)
    for piece, values in ((one.view(_INDEX_DTYPES[patch.indices.dtype]), two.view(code)) for one, two in stored):
        _check_indices(patch, piece, position, last)
        position, last = position + piece.size, int(piece[-1])
        blocks = piece // block
        cuts = np.flatnonzero(blocks[1:] != blocks[:-1]) + 1
        for start, stop in pairwise([0, *cuts.tolist(), piece.size]):
            yield BlockChange(int(blocks[start]), piece[start:stop] % block, values[start:stop])


def _require_match(patch: TensorPatch) -> None:
    """Refuse indices and values that do not belong together."""
    facts = [f"{part.dtype} {list(part.shape)}" for part in (patch.indices, patch.values)]
    problem = expected = None
    if patch.indices.dtype not in _INDEX_DTYPES or len(patch.indices.shape) != 1:
        problem, expected = "not a list of indices", "I32 or I64 of one dimension"
    elif patch.values.shape != patch.indices.shape:
        problem, expected = "not as many values as indices", f"values of shape {list(patch.indices.shape)}"
    elif DTYPES[patch.values.dtype].bits % 8:
        problem, expected = "elements smaller than a byte cannot be patched", "whole bytes"
    elif patch.count > math.prod(patch.shape):
        problem, expected = "more indices than the tensor has coordinates", f"at most {math.prod(patch.shape)}"
    if problem is not None:
        raise PatchError(
            problem,
            file=patch.indices.shard.path,
            tensor=patch.name,
            expected=expected,
            found=f"indices {facts[0]}, values {facts[1]}",
            hint=_DAMAGED,
        )


def _check_indices(patch: TensorPatch, indices: NDArray[np.signedinteger[Any]], position: int, last: int) -> None:
    numel = math.prod(patch.shape)
    before = np.empty_like(indices)
    before[0], before[1:] = last, indices[:-1]
    # Those that ascend from -1 are not negative.
    wrong = np.flatnonzero((indices <= before) | (indices >= numel))
    if not wrong.size:
        return
    at = int(wrong[0])
    found = int(indices[at])
    outside = not 0 <= found < numel
    raise PatchError(
        "an index lies outside the tensor" if outside else "the indices do not ascend",
        file=patch.indices.shard.path,
        tensor=patch.name,
        expected=f"at least 0 and below {numel}" if outside else f"more than {int(before[at])}, the one before",
        found=f"{found} at position {position + at}",
        hint=_DAMAGED,
    )
