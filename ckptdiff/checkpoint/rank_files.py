"""Read files that torch.save wrote as one checkpoint: one for each rank, with its slices of the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckptdiff.checkpoint.header import Shard, Slice, TensorInfo
from ckptdiff.checkpoint.scattered import as_stored
from ckptdiff.checkpoint.torch_file import Saved, TorchFile, read_torch_file
from ckptdiff.errors import CheckpointError

__all__ = ["Slices", "read_ranks", "read_whole", "tensors_of"]


@dataclass(frozen=True, slots=True)
class Slices:
    """What several files hold of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    slices: list[Slice]


def read_ranks(paths: Sequence[str], part: str | None) -> tuple[list[Shard], list[TensorInfo], list[str]]:
    """Read the files of all ranks.

    Parameters
    ----------
    paths : sequence of str
        One file for each rank, in their order.
    part : str, optional
        Of what each holds.

    Returns
    -------
    shards, tensors, warnings
        Tensors in the order of their first slices.

    Raises
    ------
    CheckpointError
        A file that cannot be read, or slices that do not fit together.
    """
    files = [read_torch_file(path, part) for path in paths]
    found: dict[str, Slices] = {}
    for file in files:
        for name, saved in file.tensors.items():
            known = found.setdefault(name, Slices(saved.dtype, saved.shape, []))
            if (known.dtype, known.shape) != (saved.dtype, saved.shape):
                raise _unlike(name, file, known, saved)
            known.slices.extend(saved.slices)
    said = files[0].part.said(paths[0])
    return [file.shard for file in files], tensors_of(found, files[0].shard), [said] if said else []


def read_whole(path: str, part: str | None) -> tuple[Shard, list[TensorInfo], list[str]]:
    """Read a single file; returns it, its tensors in the order of their bytes, and warnings. Raises CheckpointError."""
    shards, tensors, warnings = read_ranks([path], part)
    return shards[0], tensors, warnings


def tensors_of(found: Mapping[str, Slices], shard: Shard) -> list[TensorInfo]:
    """Put tensors together of their slices, and in the order of files and bytes; raises CheckpointError."""
    tensors = (as_stored(name, one.dtype, one.shape, one.slices, shard) for name, one in found.items())
    return sorted(tensors, key=_place)


def _place(tensor: TensorInfo) -> tuple[str, int, str]:
    return tensor.shard.path, tensor.slices[0].start if tensor.slices else tensor.start, tensor.name


def _unlike(name: str, file: TorchFile, known: Slices, saved: Saved) -> CheckpointError:
    return CheckpointError(
        "the files of two ranks disagree about the tensor",
        file=file.shard.path,
        tensor=name,
        expected=f"{known.dtype} of shape {list(known.shape)}, as in the files before it",
        found=f"{saved.dtype} of shape {list(saved.shape)}",
        hint="they may come from different saves: name a folder of one",
    )
