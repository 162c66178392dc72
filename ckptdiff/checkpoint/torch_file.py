"""Find the tensors of a file that torch.save wrote: whole ones, and slices that one of several ranks holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckptdiff.checkpoint.dtypes import DTYPES
from ckptdiff.checkpoint.header import Shard, Slice
from ckptdiff.checkpoint.regular_file import open_regular
from ckptdiff.checkpoint.state_dict import ModelPart, find_model
from ckptdiff.checkpoint.torch_classes import STORAGE_DTYPES, TORCH_DTYPES
from ckptdiff.checkpoint.torch_zip import Record, TorchZip, open_zip
from ckptdiff.checkpoint.unpickle import Made, Named, attributes, bare_name
from ckptdiff.errors import HeaderError

__all__ = ["Saved", "TorchFile", "read_torch_file", "saved_tensor", "sizes_in"]

_PLAIN = "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"
_WRAPPED = "_rebuild_parameter", "_rebuild_parameter_with_state", "Parameter", "Buffer"
_SUBCLASS = "_rebuild_from_type_v2"
_TENSORS = {*_PLAIN, *_WRAPPED, _SUBCLASS, "_rebuild_meta_tensor_no_storage", "ShardedTensor"}
_LIMIT = 2**63
_MOST_SPLITS = 100_000


@dataclass(frozen=True, slots=True)
class Saved:
    """What a file holds of a tensor.

    Attributes
    ----------
    dtype : str
    shape : tuple of int
        Of the whole.
    slices : tuple of Slice
        What of it lies in this file; maybe nothing.
    """

    dtype: str
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]


@dataclass(frozen=True, slots=True)
class TorchFile:
    """What a file holds.

    Attributes
    ----------
    shard : Shard
    tensors : mapping of str to Saved
        Of the model, by name.
    part : ModelPart
        Where in the file they are.
    """

    shard: Shard
    tensors: Mapping[str, Saved]
    part: ModelPart


def read_torch_file(path: str, part: str | None = None) -> TorchFile:
    """Read the directory and the pickle of a file.

    Parameters
    ----------
    path : str
    part : str, optional
        Of what it holds, as :func:`~ckptdiff.checkpoint.state_dict.find_model` takes it.

    Raises
    ------
    HeaderError
        No file of torch's, a pickle of other things than tensors, or a tensor that is not stored plainly.
    CheckpointError
        A file that cannot be read, or no single part that holds weights.
    """
    with open_regular(path) as (descriptor, status):
        archive = open_zip(descriptor, 0, status.st_size, path)
    shard = Shard(
        path=path,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        device=status.st_dev,
        inode=status.st_ino,
        header_sha256=archive.digest,
        metadata={},
    )
    model = find_model(archive.content, _is_tensor, path, part)
    tensors = {name: saved_tensor(name, made, archive, shard) for name, made in model.tensors.items()}
    return TorchFile(shard, tensors, model)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Made) and value.kind in _TENSORS


def saved_tensor(name: str, made: Made, archive: TorchZip, shard: Shard) -> Saved:
    """Find where a tensor lies.

    Parameters
    ----------
    name : str
        For messages.
    made : Made
        How the pickle makes it.
    archive : TorchZip
        That holds its storage.
    shard : Shard
        The file.

    Raises
    ------
    HeaderError
        A tensor that is not stored plainly, or lies beyond its storage.
    """
    try:
        return _Reader(name, archive, shard).read(made)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
        raise HeaderError(
            "the pickle does not describe the tensor as torch does",
            file=shard.path,
            tensor=name,
            expected="a tensor, a parameter, a DTensor or a ShardedTensor",
            found=f"{type(error).__name__}: {error}"[:200],
            hint="save it again as a plain tensor",
        ) from None


def sizes_in(value: object) -> tuple[int, ...]:
    """Sizes, offsets or strides; raises TypeError or ValueError for what is none."""
    if not isinstance(value, (tuple, list)) or not set(map(type, value)) <= {int}:
        raise TypeError("sizes that are no integers")
    if len(value) > 64 or any(not 0 <= size < _LIMIT for size in value):
        raise ValueError("sizes below 0 or above 2^63, or too many of them")
    return tuple(value)


class _Reader:
    """Reads one tensor of a pickle."""

    def __init__(self, name: str, archive: TorchZip, shard: Shard) -> None:
        self._name, self._archive, self._shard = name, archive, shard

    def refuse(self, problem: str, expected: str, found: str) -> HeaderError:
        return HeaderError(
            problem,
            file=self._shard.path,
            tensor=self._name,
            expected=expected,
            found=found,
            hint="save it again as a plain tensor, or leave it out",
        )

    def read(self, made: Made) -> Saved:
        while made.kind in _WRAPPED:
            made = made.args[0]
        if made.kind in _PLAIN:
            return self._plain(made)
        if made.kind == "ShardedTensor":
            return self._sharded(made.state)
        if made.kind == _SUBCLASS:
            function, of, args, state = made.args
            if bare_name(of.name) == "DTensor":
                return self._distributed(args, attributes(state))
            if bare_name(of.name) == "ShardedTensor":
                return self._sharded(state)
            if bare_name(of.name) in ("Tensor", "Parameter", "Buffer"):
                return self.read(Made(function.name, args))
        raise self.refuse("the tensor has no values of its own in the file", "a plain tensor", made.of)

    def _plain(self, made: Made) -> Saved:
        storage, offset, size, stride = made.args[:4]
        shape, strides = sizes_in(size), sizes_in(stride)
        (offset,) = sizes_in((offset,))
        kind, key, count, dtype = self._storage(storage)
        if made.kind == "_rebuild_tensor_v3":
            dtype = self._dtype(made.args[6])
        elif dtype is None:
            raise TypeError(f"a {kind} without a dtype")
        width = DTYPES[dtype].bits // 8
        record = self._archive.storages.get(key)
        held = count * (1 if kind == "UntypedStorage" else width)
        if record is None or record.size != held:
            raise self.refuse(
                "the file does not hold the tensor's storage", f"a record data/{key} of {held} bytes", _told(record)
            )
        if len(shape) != len(strides):
            raise ValueError("strides for another number of axes")
        numel = math.prod(shape)
        last = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) if numel else -1
        if (last + 1) * width > record.size or math.prod(size for size in shape if size) * width >= _LIMIT:
            raise self.refuse(
                "the tensor lies beyond its storage", f"at most {record.size} bytes", f"{(last + 1) * width} bytes"
            )
        start = record.start + (offset * width if numel else 0)
        return Saved(dtype, shape, (Slice(self._shard, start, (0,) * len(shape), shape, strides),))

    def _storage(self, storage: Any) -> tuple[str, str, int, str | None]:
        """Class, key, number of elements and dtype."""
        what, kind, key, _, count = storage.described
        if what != "storage" or not isinstance(key, str):
            raise TypeError("a storage that is none")
        bare = bare_name(kind.name)
        if bare not in STORAGE_DTYPES:
            raise self.refuse("a dtype that is not read", "one of " + " ".join(TORCH_DTYPES), kind.name)
        return bare, key, sizes_in((count,))[0], STORAGE_DTYPES[bare]

    def _dtype(self, named: Named) -> str:
        if named.name not in TORCH_DTYPES:
            raise self.refuse("a dtype that is not read", "one of " + " ".join(TORCH_DTYPES), named.name)
        return TORCH_DTYPES[named.name]

    def _sharded(self, state: Any) -> Saved:
        """Of a ShardedTensor, the shards that this rank holds."""
        shards, metadata = state[:2]
        shape = sizes_in(metadata.fields()["size"])
        dtype = self._dtype(metadata.fields()["tensor_properties"].state[0])
        found: list[Slice] = []
        for shard in shards:
            held = self.read(shard.fields()["tensor"])
            offsets = sizes_in(shard.fields()["metadata"].fields()["shard_offsets"])
            if held.dtype != dtype or not len(offsets) == len(shape) == len(held.shape):
                whole, one = f"{dtype} of {list(shape)}", f"{held.dtype} of {list(held.shape)}"
                raise self.refuse("a slice is not of its tensor", whole, one)
            found.append(replace(held.slices[0], offsets=offsets))
        return Saved(dtype, shape, tuple(found))

    def _distributed(self, args: tuple[Any, ...], fields: Mapping[str, Any]) -> Saved:
        """Of a DTensor, what this rank holds."""
        dtype, shape = self._dtype(args[1]), sizes_in(args[2])
        local, spec = self.read(fields["_local_tensor"]), fields["_spec"].fields()
        mesh = spec["mesh"].fields()
        rank, ranks = sizes_in(mesh["_coordinate_on_dim"]), _mesh_shape(mesh)
        placements = spec["placements"]
        if not len(rank) == len(ranks) == len(placements):
            raise ValueError("a mesh of another number of dimensions than placements")
        # What of each axis this rank holds, in runs; each dimension of the mesh takes a part of what those before left.
        held: list[_Runs] = [[(0, size)] for size in shape]
        for placement, at, count in zip(placements, rank, ranks, strict=True):
            if placement.kind in ("Partial", "_Partial"):
                raise self.refuse("the tensor is a sum over ranks that was not taken", "shards or replicas", "Partial")
            if placement.kind != "Replicate":
                given = placement.fields() or dict(zip(("dim", "split_factor"), placement.args, strict=False))
                axis, splits = given["dim"] % len(shape), given.get("split_factor", 1)
                if not 1 <= splits <= _MOST_SPLITS:
                    raise ValueError("a split into too many parts")
                parts = [_chunk(held[axis], part, splits) for part in range(splits)]
                held[axis] = [run for part in parts for run in _chunk(part, at, count)]
        (one,) = local.slices
        sizes = tuple([sum(stop - start for start, stop in runs) for runs in held])
        if local.dtype != dtype or (sizes != local.shape and not (0 in sizes and 0 in local.shape)):
            raise self.refuse(
                "a slice has another dtype or shape than its mesh says",
                f"{dtype} of {list(sizes)}, a part of {list(shape)}",
                f"{local.dtype} of {list(local.shape)}",
            )
        found = []
        for runs in itertools.product(*map(_with_places, held)) if all(sizes) else ():
            further = sum(place * step for (_, _, place), step in zip(runs, one.strides, strict=True))
            start = one.start + further * DTYPES[dtype].bits // 8
            offsets, counts = tuple(first for first, _, _ in runs), tuple(stop - first for first, stop, _ in runs)
            found.append(Slice(one.shard, start, offsets, counts, one.strides))
        return Saved(dtype, shape, tuple(found))


_Runs = list[tuple[int, int]]


def _chunk(runs: _Runs, at: int, count: int) -> _Runs:
    """One of so many parts of indices in runs, as torch.chunk cuts them: all but the last ones of one size."""
    total = sum(stop - start for start, stop in runs)
    size = -(-total // count)
    first, last = min(at * size, total), min((at + 1) * size, total)
    found: _Runs = []
    done = 0
    for start, stop in runs:
        begin, end = start + max(first - done, 0), min(start + last - done, stop)
        done += stop - start
        if begin < end:
            found.append((begin, end))
    return found


def _with_places(runs: _Runs) -> list[tuple[int, int, int]]:
    """Runs, joined where they touch, each with its place among all that are held."""
    found: list[tuple[int, int, int]] = []
    place = 0
    for start, stop in runs:
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], stop, found[-1][2]
        else:
            found.append((start, stop, place))
        place += stop - start
    return found


def _mesh_shape(mesh: Mapping[str, Any]) -> tuple[int, ...]:
    """How many ranks a mesh has along each dimension, which versions of torch keep differently."""
    layout = mesh.get("_layout")
    if layout is None:
        return sizes_in(mesh["mesh"].args[2])
    fields = layout.fields()
    shape = [axis.fields()["shape"] for axis in fields["axes"]] if "axes" in fields else fields["shape"]
    each = shape if isinstance(shape, (tuple, list)) else (shape,)
    return tuple(math.prod(sizes_in(one if isinstance(one, tuple) else (one,))) for one in each)


def _told(record: Record | None) -> str:
    return "none" if record is None else f"{record.size} bytes"
