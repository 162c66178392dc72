"""Check the index of a sharded checkpoint, a hint, against every shard's header."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ckptdiff.checkpoint.header import Shard, TensorInfo
from ckptdiff.checkpoint.regular_file import read_whole, stat_path
from ckptdiff.checkpoint.strict_json import JsonProblemError, parse_object
from ckptdiff.checkpoint.tensor_info import bytes_of, kinds_of
from ckptdiff.errors import CheckpointError, IndexFileError, first_few, plural

__all__ = ["MAX_INDEX_BYTES", "Index", "check_index", "check_shard_name", "parse_index", "read_index"]

MAX_INDEX_BYTES = 100_000_000
"""The longest index that is read."""


@dataclass(frozen=True, slots=True)
class Index:
    """What a ``*.safetensors.index.json`` claims, or a ``*.bin.index.json``.

    Attributes
    ----------
    path : str
        The index file.
    weight_map : mapping of str to str
        Which shard, by the name the index gives it, stores each tensor.
    shard_paths : mapping of str to str
        Where each of those shards is.
    total_size : int or None
        Bytes of all tensors, if the index says it as a number.
    raw : bytes
        The index file as it was read.
    """

    path: str
    weight_map: Mapping[str, str]
    shard_paths: Mapping[str, str]
    total_size: int | None
    raw: bytes = field(repr=False)


def read_index(path: str, limit: int = MAX_INDEX_BYTES) -> Index:
    """Read an index and find its shards, which must exist inside the index's own folder.

    Raises
    ------
    IndexFileError
        Longer than `limit` bytes, not a JSON object of the right form, or a shard that is missing or outside.
    CheckpointError
        An index that cannot be read.
    """
    return parse_index(path, read_whole(path, limit, IndexFileError), partial(_locate_shard, path))


def parse_index(path: str, raw: bytes, locate: Callable[[str, str], str]) -> Index:
    """Read an index that is in memory.

    Parameters
    ----------
    path : str
        Of it, for messages.
    raw : bytes
    locate : callable
        Says where a shard is, of a tensor's name and the shard's; raises IndexFileError for one that cannot be.

    Raises
    ------
    IndexFileError
        As :func:`read_index` does.
    """
    try:
        content = parse_object(raw)
    except JsonProblemError as error:
        raise IndexFileError(
            f"the index {error.problem}", file=path, expected=error.expected, found=error.found
        ) from error
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict):
        raise IndexFileError(
            "the index has no weight_map",
            file=path,
            expected='"weight_map": {tensor: shard, ...}',
            found="none" if weight_map is None else type(weight_map).__name__,
        )
    if not weight_map:
        raise IndexFileError("the index names no tensor", file=path)
    shard_paths: dict[str, str] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise IndexFileError(
                "weight_map does not give the tensor a file name",
                file=path,
                tensor=tensor,
                expected="a file name",
                found=type(shard).__name__,
            )
        if shard not in shard_paths:
            shard_paths[shard] = locate(tensor, shard)
    metadata = content.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return Index(path, weight_map, shard_paths, int(total) if isinstance(total, (int, float)) else None, raw)


def check_index(
    index: Index, shards: Mapping[str, Shard], tensors: Mapping[str, TensorInfo], held: int
) -> tuple[str, ...]:
    """Compare an index with the headers of its shards.

    Parameters
    ----------
    index : Index
        The claim.
    shards : mapping of str to Shard
        The headers read, by the paths of `Index.shard_paths`.
    tensors : mapping of str to TensorInfo
        Every tensor of those shards.
    held : int
        Their bytes.

    Returns
    -------
    tuple of str
        Warnings: tensors the index leaves out, a total size that is not theirs.

    Raises
    ------
    IndexFileError
        A tensor that the shard named for it lacks.
    """
    called = {name: shards[path] for name, path in index.shard_paths.items()}
    for name, shard_name in index.weight_map.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.shard is not called[shard_name]:
            raise IndexFileError(
                "the index names a shard that lacks the tensor",
                file=index.path,
                tensor=name,
                expected=f"the tensor in {shard_name}",
                found="it is in no shard" if tensor is None else f"it is in {tensor.shard.path}",
                hint="the index and the shards come from different saves: download both again",
            )
    warnings: list[str] = []
    unnamed = [name for name in tensors if name not in index.weight_map]
    if unnamed:
        warnings.append(
            f"{index.path} leaves out {plural(len(unnamed), 'tensor')} that its shards hold: {first_few(unnamed)}"
        )
    if index.total_size not in (None, held) and index.total_size != bytes_of(
        kinds_of(tensors[name] for name in index.weight_map)
    ):
        warnings.append(f"{index.path} gives total_size {index.total_size}, its shards hold {held} bytes")
    return tuple(warnings)


def check_shard_name(index: str, tensor: str, shard: str) -> None:
    """Raise IndexFileError for a name of a shard that leads out of the index's folder."""
    if not shard or any(part in ("", ".", "..") for part in shard.split("/")) or "\\" in shard or "\0" in shard:
        raise _outside(index, tensor, shard)


def _locate_shard(index: str, tensor: str, shard: str) -> str:
    """Find one shard without leaving the index's folder, except by a link in a shard's own place."""
    folder = Path(index).parent
    check_shard_name(index, tensor, shard)
    path = folder / shard
    # Hugging Face snapshots link each shard to a blob elsewhere; a linked folder on the way is not such a link.
    if not Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(folder)):
        raise _outside(index, tensor, shard)
    try:
        stat_path(str(path))
    except CheckpointError as error:
        raise IndexFileError(
            "the index names a shard that is missing or cannot be reached",
            file=index,
            tensor=tensor,
            expected=f"a file {path}",
            found=error.problem if error.found is None else f"{error.problem}: {error.found}",
            hint=error.hint or "the download may be incomplete: download it again",
        ) from error
    return str(path)


def _outside(index: str, tensor: str, shard: str) -> IndexFileError:
    return IndexFileError(
        "the index names a shard outside its folder",
        file=index,
        tensor=tensor,
        expected="a file name in the index's own folder",
        found=shard,
    )
