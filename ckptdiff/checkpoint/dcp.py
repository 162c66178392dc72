"""Read where the tensors of a torch.distributed.checkpoint folder lie: ``.metadata`` and the files that it names."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ckptdiff.checkpoint.header import Shard, TensorInfo
from ckptdiff.checkpoint.rank_files import Slices, tensors_of
from ckptdiff.checkpoint.regular_file import open_regular, read_whole
from ckptdiff.checkpoint.state_dict import ModelPart, find_model
from ckptdiff.checkpoint.torch_classes import TORCH_DTYPES
from ckptdiff.checkpoint.torch_file import saved_tensor, sizes_in
from ckptdiff.checkpoint.torch_zip import MAX_PICKLE_BYTES, open_zip
from ckptdiff.checkpoint.unpickle import Made, unpickle
from ckptdiff.errors import CheckpointError, HeaderError

__all__ = ["read_dcp"]


class _Chunk(NamedTuple):
    """A box of a tensor, and where it lies: an archive of its own in a file."""

    start: int
    length: int
    tensor: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def read_dcp(metadata: str, part: str | None) -> tuple[list[Shard], list[TensorInfo], list[str]]:
    """Read a folder that torch.distributed.checkpoint wrote.

    Parameters
    ----------
    metadata : str
        Its ``.metadata``.
    part : str, optional
        Of what it holds.

    Returns
    -------
    shards, tensors, warnings
        Files that hold no weights are none of the shards.

    Raises
    ------
    CheckpointError
        A file that is damaged, missing, or cannot be read; slices that do not fit together.
    """
    saved = unpickle(read_whole(metadata, MAX_PICKLE_BYTES), metadata, "the metadata")
    try:
        model, of_files, found = _planned(saved, metadata, part)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise HeaderError(
            "the metadata are not those of torch.distributed.checkpoint",
            file=metadata,
            expected="Metadata with state_dict_metadata and storage_data",
            found=f"{type(error).__name__}: {error}"[:200],
        ) from None
    shards = [_read_file(_locate(metadata, name), of_files[name], found) for name in sorted(of_files)]
    said = model.said(str(Path(metadata).parent))
    return shards, tensors_of(found, shards[0]), [said] if said else []


def _planned(
    saved: Any, metadata: str, part: str | None
) -> tuple[ModelPart, dict[str, list[_Chunk]], dict[str, Slices]]:
    """What the metadata say: the model's part, the chunks of each file, and each tensor without its slices yet."""
    fields = saved.fields()
    described: Mapping[str, Made] = fields["state_dict_metadata"]
    paths = fields.get("planner_data") or {}
    tree: dict[Any, Any] = {}
    for name, made in described.items():
        if made.kind == "TensorStorageMetadata":
            *above, last = map(str, _keys(paths.get(name, (name,))))
            level = tree
            for key in above:
                level = level.setdefault(key, {})
            level[last] = name
    model = find_model(tree, lambda value: isinstance(value, str), metadata, part)
    stored = {}
    for index, info in fields["storage_data"].items():
        of = index.fields()
        stored[_keys((of["fqn"],)), sizes_in(of.get("offset") or ())] = info.fields()
    of_files: dict[str, list[_Chunk]] = defaultdict(list)
    found: dict[str, Slices] = {}
    for name, key in model.tensors.items():
        tensor = described[key].fields()
        named = tensor["properties"].state[0].name
        if named not in TORCH_DTYPES:
            expected = "one of " + " ".join(TORCH_DTYPES)
            raise HeaderError("a dtype that is not read", file=metadata, tensor=name, expected=expected, found=named)
        found[name] = Slices(TORCH_DTYPES[named], sizes_in(tensor["size"]), [])
        for chunk in tensor["chunks"]:
            offsets, sizes = sizes_in(chunk.fields()["offsets"]), sizes_in(chunk.fields()["sizes"])
            if not len(offsets) == len(sizes) == len(found[name].shape):
                raise ValueError(f"a chunk of {name!a} with another number of axes")
            where = stored.get(((key,), offsets))
            if where is None:
                raise HeaderError(
                    "the metadata do not say where a slice of the tensor lies",
                    file=metadata,
                    tensor=name,
                    expected=f"storage_data of the slice at {list(offsets)}",
                    found="none",
                    hint="a save may be incomplete: take the one before it",
                )
            if where.get("transform_descriptors"):
                raise HeaderError(
                    "the tensor is stored compressed, or changed otherwise",
                    file=metadata,
                    tensor=name,
                    expected="tensors as torch.save stores them",
                    found="transform_descriptors",
                    hint="save it without extensions",
                )
            start, length = sizes_in((where["offset"], where["length"]))
            (path,) = _keys((where["relative_path"],))
            of_files[str(path)].append(_Chunk(start, length, name, found[name].dtype, offsets, sizes))
    if not of_files:
        raise ValueError("tensors without a slice")
    return model, of_files, found


def _keys(values: Any) -> tuple[str | int, ...]:
    if not all(isinstance(value, (str, int)) for value in values):
        raise TypeError("a name that is no text")
    return tuple(values)


def _locate(metadata: str, name: str) -> str:
    """The path of a file that the metadata name, which must lie in their folder."""
    if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
        raise HeaderError(
            "the metadata name a file outside their folder",
            file=metadata,
            expected="a file name in the folder of .metadata",
            found=ascii(name)[:200],
        )
    path = Path(metadata).parent / name
    if not path.exists():
        raise CheckpointError(
            "the metadata name a file that is missing",
            file=metadata,
            expected=f"a file {path}",
            found="none",
            hint="a save or a copy may be incomplete, or a rank's files lie on another machine",
        )
    return str(path)


def _read_file(path: str, chunks: list[_Chunk], found: Mapping[str, Slices]) -> Shard:
    """Read the directories of a file's archives, and add what lies in them to each tensor's slices."""
    chunks.sort()
    with open_regular(path) as (descriptor, status):
        end, previous = 0, ""
        archives = []
        for chunk in chunks:
            problem = "two slices share their place in a file" if chunk.start < end else None
            if chunk.start + chunk.length > status.st_size:
                problem = "the file is truncated: a slice lies beyond its end"
            if problem is not None:
                raise HeaderError(
                    problem,
                    file=path,
                    tensor=chunk.tensor,
                    expected=f"{chunk.length} bytes at {chunk.start}",
                    found=f"a file of {status.st_size} bytes, and {previous or 'nothing'} up to {end}",
                    hint="the save or the copy may be incomplete: fetch it again",
                )
            end, previous = chunk.start + chunk.length, chunk.tensor
            archives.append(open_zip(descriptor, chunk.start, chunk.length, path, chunk.tensor))
    shard = Shard(
        path=path,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        device=status.st_dev,
        inode=status.st_ino,
        header_sha256=hashlib.sha256("".join(archive.digest for archive in archives).encode()).hexdigest(),
        metadata={},
    )
    for chunk, archive in zip(chunks, archives, strict=True):
        made = archive.content
        saved = saved_tensor(chunk.tensor, made, archive, shard) if isinstance(made, Made) else None
        if saved is None or (saved.dtype, saved.shape) != (chunk.dtype, chunk.sizes):
            raise HeaderError(
                "the file holds something else than the metadata say",
                file=path,
                tensor=chunk.tensor,
                expected=f"{chunk.dtype} of shape {list(chunk.sizes)}",
                found="no tensor" if saved is None else f"{saved.dtype} of shape {list(saved.shape)}",
                hint="the files may come from different saves",
            )
        found[chunk.tensor].slices.extend(replace(one, offsets=chunk.offsets) for one in saved.slices)
    return shard
