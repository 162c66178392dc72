"""Tell what is in a patch of a format that serving engines load."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from ckptdiff.checkpoint import DTYPES
from ckptdiff.patch.coded_block import Coding
from ckptdiff.patch.contents import TensorRow, mask_entropy_of, modules_of
from ckptdiff.patch.directory_link import read_folder, rows_of
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
    dense : int or None
        Bytes of those tensors; None of an `overwrite` directory, which does not say it.
    mask_entropy : float or None
        Bytes that it takes at least to say which of their values (bytes) change, as of
        :class:`~ckptdiff.patch.PatchContents`.
    modules : list of dict
        As there; in a directory, ``values`` and ``changed`` are bytes.
    digests : dict
        Of each tensor that it names, those of its bytes ``before``, null if that is not said, and ``after``.
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
    dense: int | None
    mask_entropy: float | None
    modules: list[dict[str, Any]]
    digests: dict[str, dict[str, str | None]]
    whole: int = 0
    version: int | None = None
    base_version: int | None = None
    encoding: str | None = None
    checksum: str | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """That it does not pay, if so."""
        if self.dense is None or self.size < self.dense:
            return ()
        return (f"the patch is not smaller than the tensors that it changes: {self.size:,} and {self.dense:,} bytes",)


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
    rows = rows_of(folder)
    said = folder.encoding != "overwrite"
    return ShippedContents(
        path=folder.path,
        format="delta-dir",
        identity=folder.identity,
        size=folder.size,
        files=len({one.shard.path for one in folder.frames.values()}),
        tensors=len(folder.frames),
        changed=sum(one.changed for one in rows),
        dense=sum(one.values for one in rows) if said else None,
        mask_entropy=mask_entropy_of(rows) if said else None,
        modules=modules_of(rows),
        digests={name: {"before": None, "after": digest} for name, digest in folder.digests.items()},
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
    rows = [
        TensorRow(
            name,
            one.shape,
            math.prod(one.shape) * DTYPES[one.values.dtype].bits // 8 // Coding.of(one.values.dtype).width,
            one.values.nbytes // Coding.of(one.values.dtype).width,
            one.values.nbytes + (0 if one.indices is None else one.indices.nbytes),
        )
        for name, one in flat.tensors.items()
    ]
    return ShippedContents(
        path=flat.shard.path,
        format="flat",
        identity=flat.shard.header_sha256,
        size=flat.shard.size,
        files=1,
        tensors=len(flat.tensors),
        changed=sum(one.changed for one in rows),
        dense=sum(math.prod(one.shape) * DTYPES[one.values.dtype].bits // 8 for one in flat.tensors.values()),
        mask_entropy=mask_entropy_of(rows),
        modules=modules_of(rows),
        digests={name: {"before": flat.before[name], "after": digest} for name, digest in flat.after.items()},
        whole=sum(one.indices is None for one in flat.tensors.values()),
        checksum="xxh3-128",
    )
