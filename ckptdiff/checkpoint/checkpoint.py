"""Open a checkpoint: the tensors of one file, or of all the shards that belong together."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ckptdiff.checkpoint.dcp import read_dcp
from ckptdiff.checkpoint.find import FoundShards, find_shards
from ckptdiff.checkpoint.header import Shard, TensorInfo, read_header
from ckptdiff.checkpoint.index import Index, check_index
from ckptdiff.checkpoint.rank_files import read_ranks, read_whole
from ckptdiff.checkpoint.slices import holds_slices, sliced, written_by_ranks
from ckptdiff.checkpoint.tensor_info import Kinds, bytes_of, kinds_of
from ckptdiff.checkpoint.torch_zip import is_zip
from ckptdiff.errors import CheckpointError
from ckptdiff.remote.address import is_url, shown
from ckptdiff.remote.hub import may_be_hub

__all__ = ["Checkpoint", "open_checkpoint", "open_pair"]

_AT_ONCE = 16
"""Headers that are fetched at a time."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, from its shards' headers.

    Attributes
    ----------
    path : str
        As the user named it.
    shards : tuple of Shard
        Its files, sorted by name; a file that two names lead to is listed once.
    tensors : mapping of str to TensorInfo
        By name, in the order of shards and, inside a shard, of bytes.
    warnings : tuple of str
        What the user should know although the checkpoint can be read.
    index : Index or None
        The index that names the shards, if there is one.
    unread : tuple of str
        Weights in the folder that `path` names, relative to it, which are not part of this: files that the index leaves
        out, and weights of subfolders, where a pattern stands for several files.
    origin : mapping
        Of a model in the hub: its ``repo``, ``commit``, and ``hashes`` of its shards; else empty.

    Examples
    --------
    >>> import ckptdiff
    >>> checkpoint = ckptdiff.open_checkpoint("fixtures/llama/base")
    >>> len(checkpoint.shards), checkpoint.tensors["lm_head.weight"].dtype
    (2, 'BF16')
    """

    path: str
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorInfo]
    warnings: tuple[str, ...]
    index: Index | None = None
    unread: tuple[str, ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def kinds(self) -> Kinds:
        """How many tensors there are of each dtype and shape."""
        return kinds_of(self.tensors.values())

    @property
    def numel(self) -> int:
        """Number of elements in all tensors."""
        return sum(count * math.prod(shape) for (_, shape), count in self.kinds.items())

    @property
    def nbytes(self) -> int:
        """Number of bytes in all tensors."""
        return bytes_of(self.kinds)


def open_checkpoint(path: str | os.PathLike[str], stream: bool = False) -> Checkpoint:
    """Find a checkpoint's shards and read their headers; no tensor data is read.

    Parameters
    ----------
    path : path-like
        A safetensors file, a ``*.safetensors.index.json``, a folder that holds either, a Hugging Face cache
        snapshot, or a cache folder ``models--ORG--NAME``; a URL of such a file or folder; or a model of the Hugging
        Face hub, ``org/name@revision``, if there is no file of that name. Or what torch wrote: a zip file, a
        ``*.bin.index.json``, a folder of such files, of a file for each rank, or of torch.distributed.checkpoint;
        ``PATH#PART`` names a part.
    stream : bool
        Whether a model of the hub is read where it is; else it is downloaded into the cache first.

    Returns
    -------
    Checkpoint
        Every tensor of every shard. An index is checked against the headers, which are the truth.

    Raises
    ------
    HeaderError
        A shard that breaks its format.
    IndexFileError
        An index that is damaged, leaves its folder, or that the shards contradict.
    CheckpointError
        Nothing to read, no permission, a missing shard, a tensor in two shards, safetensors of several ranks that hold
        slices of tensors, or slices in torch's files that do not fit together.

    Examples
    --------
    >>> import ckptdiff
    >>> ckptdiff.open_checkpoint("fixtures/llama/base").numel
    180800
    """
    return _open(os.fspath(path), stream)


def open_pair(base: str, tuned: str, stream: bool = False, quick: bool = False) -> tuple[Checkpoint, Checkpoint]:
    """Open both sides of a comparison, as :func:`open_checkpoint` does each.

    Of two models of the hub, shards that have the same hash there are downloaded once, or, if `quick`, not at all: they
    are left where they are, and their headers read there.
    """
    if stream or not (may_be_hub(base) and may_be_hub(tuned)):
        first = open_checkpoint(base, stream)
        return first, _open(tuned, stream, first)
    from ckptdiff.checkpoint.find_hub import find_hub_pair

    found = find_hub_pair(base, tuned, quick)
    first = _opened(base, found[0])
    return first, _opened(tuned, found[1], like=first)


def _open(path: str, stream: bool, like: Checkpoint | None = None) -> Checkpoint:
    named, part = _split_part(path)
    return _opened(path, _find(named, stream), part, like)


def _opened(path: str, source: FoundShards, part: str | None = None, like: Checkpoint | None = None) -> Checkpoint:
    """Read the headers of the shards that `path` means; those that are the same in another checkpoint are known."""
    called = source.path or (shown(path) if is_url(path) else path)
    warnings = list(source.warnings)
    shards: list[Shard] = []
    tensors: dict[str, TensorInfo] = {}
    by_inode: dict[tuple[int, int], Shard] = {}
    by_path: dict[str, Shard] = {}
    if source.kind != "whole":
        read = read_dcp(source.paths[0], part) if source.kind == "dcp" else read_ranks(source.paths, part)
        shards, tensors = read[0], {tensor.name: tensor for tensor in read[1]}
        return Checkpoint(called, tuple(shards), tensors, (*warnings, *read[2]), None, source.unread)
    for shard_path, (shard, held, said) in zip(source.paths, _headers(source, part, like), strict=True):
        warnings += said
        first = by_inode.setdefault((shard.device, shard.inode), shard)
        by_path[shard_path] = first
        if first is not shard:
            warnings.append(f"{shard.path} is the same file as {first.path}: read once")
            continue
        shards.append(shard)
        if held and holds_slices(shard):
            raise sliced(shard, held[0].name)
        for tensor in held:
            other = tensors.setdefault(tensor.name, tensor)
            if other is not tensor:
                by_ranks = written_by_ranks((other.shard, tensor.shard))
                raise sliced(tensor.shard, tensor.name) if by_ranks else _stored_twice(other, tensor)
    found = Checkpoint(called, tuple(shards), tensors, tuple(warnings), source.index, source.unread, source.origin)
    said = () if source.index is None else check_index(source.index, by_path, tensors, found.nbytes)
    return replace(found, warnings=(*found.warnings, *said)) if said else found


def _find(path: str, stream: bool) -> FoundShards:
    if may_be_hub(path):
        from ckptdiff.checkpoint.find_hub import find_hub

        return find_hub(path, stream)
    if is_url(path):
        from ckptdiff.checkpoint.find_remote import find_remote

        return find_remote(path)
    return find_shards(path)


def _headers(
    source: FoundShards, part: str | None, like: Checkpoint | None
) -> Iterable[tuple[Shard, Sequence[TensorInfo], Sequence[str]]]:
    """The header of each shard; several at a time where each takes its way to a host and back."""
    known: defaultdict[str, list[TensorInfo]] = defaultdict(list)
    for tensor in like.tensors.values() if like is not None else ():
        known[tensor.shard.header_sha256].append(tensor)
    if not source.elsewhere:
        return (_read_file(path, part, known) for path in source.paths)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(pool.map(lambda path: read_header(path, *source.elsewhere[path], known), source.paths))
    return [(*each, ()) for each in found]


def _split_part(path: str) -> tuple[str, str | None]:
    """The path itself, and the part of what it holds that follows a "#"; a path of that name wins."""
    named, mark, part = path.rpartition("#")
    return (named, part) if mark and part and not os.path.lexists(path) and os.path.lexists(named) else (path, None)


def _read_file(
    path: str, part: str | None, known: Mapping[str, Sequence[TensorInfo]]
) -> tuple[Shard, Sequence[TensorInfo], Sequence[str]]:
    """Read a file's header, or the directory of one that torch wrote."""
    if is_zip(path):
        return read_whole(path, part)
    shard, held = read_header(path, known=known)
    if part is not None:
        raise CheckpointError("a safetensors file has no parts", file=path, found=ascii(part), hint=f"name {path}")
    return shard, held, ()


def _stored_twice(first: TensorInfo, second: TensorInfo) -> CheckpointError:
    return CheckpointError(
        "two files of the checkpoint store the same tensor",
        file=second.shard.path,
        tensor=second.name,
        expected="each tensor in one file",
        found=f"it is also in {first.shard.path}",
        hint="name one of the two files instead of their folder",
    )
