"""Make a checkpoint of a base and a sparse patch: the base's files with some values set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import Checkpoint, Shard, TensorInfo, open_checkpoint
from ckptdiff.checkpoint.blocks import blocks_of
from ckptdiff.checkpoint.index import MAX_INDEX_BYTES, Index
from ckptdiff.checkpoint.open_shards import OpenShards, open_shards
from ckptdiff.checkpoint.regular_file import read_whole
from ckptdiff.checkpoint.torch_zip import is_zip
from ckptdiff.errors import CheckpointError, OptionError, PatchError, plural
from ckptdiff.events import Listener, Stage, stage
from ckptdiff.exports.patch_reader import Patch, TensorPatch, changes_of, open_patch
from ckptdiff.files.staged import StagedFile, StagedFolder, write_whole
from ckptdiff.measure.partial import BLOCK
from ckptdiff.runfile.check_target import check_new


@dataclass(frozen=True, slots=True)
class Applied:
    """A checkpoint that was written.

    Attributes
    ----------
    tensors : int
        How many of them the patch changed.
    coordinates : int
        How many values it set.
    rule, compare : str
        Which changes the patch was made of.
    left_out : tuple of str
        What else lies in the base's folder, and was not copied.
    warnings : tuple of str
    """

    tensors: int
    coordinates: int
    rule: str
    compare: str
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]


def apply_patch(
    base: str | os.PathLike[str],
    patch: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    force: bool = False,
    stream: bool = False,
    listener: Listener | None = None,
    block: int = BLOCK,
) -> Applied:
    """Write the base with the patched coordinates set: the same files and headers, and all other bytes as they are.

    A block of a tensor is in memory at a time, and the target takes its name when everything is written.

    Parameters
    ----------
    base : path-like
        A checkpoint, as `open_checkpoint` takes it.
    patch : path-like
        What `export_patch` wrote.
    target : path-like
        To be made: a file in ``.safetensors`` if the base is a single file, else a folder.
    force : bool
        Also take a base whose headers are not those of the base that the patch was made for.
    stream : bool
        Whether a model of the hub is read where it is; else it is downloaded first.
    listener : callable, optional
        Told of the stage "patching", in bytes.
    block : int
        Coordinates of a block; an even number, for formats of four bits.

    Returns
    -------
    Applied

    Raises
    ------
    OptionError
        A file name for a folder, or the other way round.
    PatchError
        The patch is no patch, is damaged, or does not fit the base.
    CheckpointError
        Base or patch cannot be read, or change while they are read.
    RunFileError
        The target exists or cannot be written.

    Examples
    --------
    >>> import ckptdiff
    >>> from ckptdiff.exports import apply_patch, export_patch
    >>> base, tuned = "fixtures/llama/base", "fixtures/llama/tuned"
    >>> ckptdiff.diff(base, tuned, out="stored.h5", compare="stored", mask="bitwise").identical
    False
    >>> with ckptdiff.RunFile("stored.h5") as run:
    ...     changed = export_patch(run, "whole.safetensors")
    >>> made = apply_patch(base, "whole.safetensors", "patched")
    >>> made.tensors == changed, ckptdiff.diff("patched", tuned, compare="stored").identical
    (True, True)
    """
    target = Path(target)
    checkpoint, found = open_checkpoint(base, stream), open_patch(patch)
    _require_safetensors(checkpoint)
    single = checkpoint.index is None and [shard.path for shard in checkpoint.shards] == [checkpoint.path]
    _require_name(target, single)
    check_new(target)
    _require_a_name_each(checkpoint)
    warnings = [*checkpoint.warnings, *_require_base(checkpoint, found, force)]
    for change in found.tensors.values():
        _require_fit(checkpoint, change)
    left_out = () if single else _left_out(checkpoint)
    write = _write_file if single else _write_folder
    with stage(listener, "patching", sum(shard.size for shard in checkpoint.shards), "bytes") as told:
        write(_Copy(checkpoint, found, told, block), target)
    return Applied(
        tensors=sum(1 for change in found.tensors.values() if change.count),
        coordinates=sum(change.count for change in found.tensors.values()),
        rule=found.rule,
        compare=found.compare,
        left_out=left_out,
        warnings=tuple(warnings),
    )


class _Copy:
    """Writes the shards of a base with a patch applied, and tells of it."""

    def __init__(self, checkpoint: Checkpoint, patch: Patch, told: Stage, block: int) -> None:
        self.checkpoint, self._patch, self._told, self._block = checkpoint, patch, told, block
        self._held = {
            path: list(tensors)
            for path, tensors in groupby(checkpoint.tensors.values(), lambda tensor: tensor.shard.path)
        }

    def write(self, staged: StagedFile, shards: OpenShards, shard: Shard) -> None:
        tensors = self._held.get(shard.path, [])
        # The header is copied as it is, so that order, metadata and padding stay.
        length = tensors[0].start if tensors else shard.size
        for piece in blocks_of(shards, TensorInfo("the header", "U8", (length,), shard, 0, length), self._block):
            staged.write(piece.data)
            self._told.more(piece.nbytes)
        staged.check()
        for tensor in tensors:
            change = self._patch.tensors.get(tensor.name)
            for piece in _patched(shards, tensor, change, self._block):
                staged.write(piece.data)
                staged.check()
                self._told.more(piece.nbytes, tensor.name)


def _write_file(copy: _Copy, target: Path) -> None:
    with StagedFile(target) as staged:
        with open_shards("pread") as shards:
            copy.write(staged, shards, copy.checkpoint.shards[0])
        staged.commit()


def _write_folder(copy: _Copy, target: Path) -> None:
    checkpoint = copy.checkpoint
    folder = _folder(checkpoint)
    with StagedFolder(target) as made:
        with open_shards("pread") as shards:
            for shard in checkpoint.shards:
                path = made.path / Path(shard.path).relative_to(folder)
                path.parent.mkdir(parents=True, exist_ok=True)
                with StagedFile(path) as staged:
                    copy.write(staged, shards, shard)
                    staged.commit()
        if checkpoint.index is not None:
            name = Path(checkpoint.index.path).name
            write_whole(made.path / name, _index_of(checkpoint, checkpoint.index))
        made.commit()


def _patched(
    shards: OpenShards, tensor: TensorInfo, patch: TensorPatch | None, block: int
) -> Iterator[NDArray[np.uint8]]:
    """Stored bytes of a tensor, a block at a time, with the patch applied, if there is one."""
    changes = changes_of(shards, patch, block) if patch else iter(())
    change = next(changes, None)
    for place, stored in enumerate(blocks_of(shards, tensor, block)):
        if change is None or change.block != place:
            yield stored
            continue
        codes = stored.view(change.values.dtype).copy()
        while change is not None and change.block == place:
            codes[change.offsets] = change.values
            change = next(changes, None)
        yield codes.view(np.uint8)


def _require_safetensors(checkpoint: Checkpoint) -> None:
    """Refuse what torch wrote: its checksums and places of storages would have to be written anew."""
    other = next((shard.path for shard in checkpoint.shards if shard.remote is None and is_zip(shard.path)), None)
    if other is not None:
        raise CheckpointError(
            "a patch is applied to safetensors files",
            file=other,
            found="a file that torch wrote",
            hint="save the base as safetensors, and apply the patch to that with --force",
        )


def _require_name(target: Path, single: bool) -> None:
    if single == (target.suffix == ".safetensors"):
        return
    raise OptionError(
        "the base is a single file" if single else "the base is a folder of shards",
        file=target,
        expected="a name in .safetensors" if single else "the name of a folder",
        found=target.name,
    )


def _require_a_name_each(checkpoint: Checkpoint) -> None:
    """Refuse an index that names a file twice, by a link: the copy would lack one of the names."""
    index = checkpoint.index
    if index is not None and len(index.shard_paths) != len(checkpoint.shards):
        raise CheckpointError(
            "the index gives one file two names",
            file=index.path,
            expected=f"{len(index.shard_paths)} files",
            found=f"{len(checkpoint.shards)}",
        )


def _require_base(checkpoint: Checkpoint, patch: Patch, force: bool) -> list[str]:
    """Compare the base's headers with those that the patch was made for; returns a warning if they may differ."""
    if any((shard.device, shard.inode) == (patch.shard.device, patch.shard.inode) for shard in checkpoint.shards):
        raise PatchError(
            "the patch lies among the shards of the base, and would be read as one of them",
            file=patch.shard.path,
            hint="move it to another folder",
        )
    found = sorted((shard.header_sha256, shard.size) for shard in checkpoint.shards)
    if found == list(patch.base):
        return []
    known = len(set(found) & set(patch.base))
    if force:
        return ["the base is not the one that the patch was made for, by its headers; applied all the same"]
    raise PatchError(
        "not the base that the patch was made for",
        file=checkpoint.path,
        expected=f"{plural(len(patch.base), 'shard')} with the headers that {patch.shard.path} names",
        found=f"{plural(len(found), 'shard')}, of which {known} have such a header",
        hint="if it holds the same weights in other files, --force",
    )


def _require_fit(checkpoint: Checkpoint, patch: TensorPatch) -> None:
    file = patch.indices.shard.path
    tensor = checkpoint.tensors.get(patch.name)
    if tensor is None:
        raise PatchError(
            "the base lacks a tensor that the patch changes",
            file=file,
            tensor=patch.name,
            expected=f"the tensor in {checkpoint.path}",
            found="it is in no shard",
        )
    if tensor.shape != patch.shape:
        raise PatchError(
            "the tensor has another shape in the base",
            file=file,
            tensor=patch.name,
            expected=f"shape {list(patch.shape)}, as when the patch was made",
            found=f"shape {list(tensor.shape)}",
        )
    if tensor.dtype != patch.values.dtype:
        raise PatchError(
            "the tensor has another dtype in the base",
            file=file,
            tensor=patch.name,
            expected=f"{tensor.dtype}, as in {checkpoint.path}",
            found=f"values in {patch.values.dtype}",
            hint="export a patch without this tensor, or of a tuned checkpoint in the base's dtypes",
        )


def _folder(checkpoint: Checkpoint) -> Path:
    return Path(checkpoint.index.path if checkpoint.index else checkpoint.shards[0].path).parent


def _index_of(checkpoint: Checkpoint, index: Index) -> bytes:
    remote = checkpoint.shards[0].remote
    if remote is None:
        return read_whole(index.path, MAX_INDEX_BYTES)
    from ckptdiff.remote.transport import fetch_whole

    return fetch_whole(remote.address.beside(Path(index.path).name), MAX_INDEX_BYTES)


def _left_out(checkpoint: Checkpoint) -> tuple[str, ...]:
    if checkpoint.shards[0].remote is not None:
        return ()  # what lies beside it there is not listed everywhere
    folder = _folder(checkpoint)
    copied = {Path(shard.path).relative_to(folder).parts[0] for shard in checkpoint.shards}
    if checkpoint.index is not None:
        copied.add(Path(checkpoint.index.path).name)
    return tuple(sorted(path.name for path in folder.iterdir() if path.name not in copied and path.name[0] != "."))
