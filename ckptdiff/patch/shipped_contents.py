"""Tell what is in a patch of a format that serving engines load."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ckptdiff.patch.directory_link import changed_bytes, read_folder
from ckptdiff.patch.flat_link import read_flat

__all__ = ["ShippedContents", "contents_of_flat", "contents_of_folder"]


@dataclass(frozen=True, slots=True)
class ShippedContents:
    """What a directory of deltas or a flat patch holds.

    Attributes
    ----------
    path, format : str
        The latter is "delta-dir" or "flat".
    identity : str
        SHA-256 of its index and headers.
    size, files : int
        Bytes of the safetensors files, and of the index if there is one; and how many safetensors files there are.
    tensors : int
        How many change.
    changed : int
        How many values, or, in a directory, bytes.
    whole : int
        Tensors that are there as a whole; their values are counted as changed.
    version, base_version, encoding, checksum
        Of a directory; else None.
    """

    path: str
    format: str
    identity: str
    size: int
    files: int
    tensors: int
    changed: int
    whole: int = 0
    version: int | None = None
    base_version: int | None = None
    encoding: str | None = None
    checksum: str | None = None


def contents_of_folder(path: str | os.PathLike[str]) -> ShippedContents:
    """Read a directory of deltas, to the end of its frames.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    ShippedContents

    Raises
    ------
    PatchError
        It is none, or is damaged.
    CheckpointError
        A file cannot be read.

    Examples
    --------
    >>> base, tuned = "fixtures/llama/base", "fixtures/llama/tuned"
    >>> from ckptdiff import patch
    >>> made = patch.make_directory(base, tuned, "weight_v000003")
    >>> patch.contents_of_folder("weight_v000003").base_version
    2
    """
    folder = read_folder(path)
    return ShippedContents(
        path=folder.path,
        format="delta-dir",
        identity=folder.identity,
        size=folder.size,
        files=len({one.shard.path for one in folder.frames.values()}),
        tensors=len(folder.frames),
        changed=changed_bytes(folder),
        version=folder.version,
        base_version=folder.base_version,
        encoding=folder.encoding,
        checksum=folder.checksum,
    )


def contents_of_flat(path: str | os.PathLike[str]) -> ShippedContents:
    """Read the header of a flat patch.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    ShippedContents

    Raises
    ------
    PatchError, CheckpointError
        As :func:`contents_of_folder`.

    Examples
    --------
    >>> base, tuned = "fixtures/llama/base", "fixtures/llama/tuned"
    >>> from ckptdiff import patch
    >>> made = patch.make_flat(base, tuned, "read.safetensors")
    >>> patch.contents_of_flat("read.safetensors").changed == made.changed
    True
    """
    flat = read_flat(path)
    return ShippedContents(
        path=flat.shard.path,
        format="flat",
        identity=flat.shard.header_sha256,
        size=flat.shard.size,
        files=1,
        tensors=len(flat.tensors),
        changed=sum(one.values.numel for one in flat.tensors.values()),
        whole=sum(one.indices is None for one in flat.tensors.values()),
        checksum="xxh3-128",
    )
