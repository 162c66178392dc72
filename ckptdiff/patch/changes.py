"""Hand out what a patch changes, piece by piece: where, and the new values."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.checkpoint.regular_file import open_regular
from ckptdiff.errors import OptionError
from ckptdiff.patch.applying import open_chain
from ckptdiff.patch.delta import BLOCK_CODES
from ckptdiff.patch.flat_link import changes_of_flat, read_flat
from ckptdiff.patch.opening import patch_kind

__all__ = ["Change", "open_patch"]


class Change(NamedTuple):
    """Changes within 2^20 codes of a tensor."""

    name: str
    dtype: str
    """As a safetensors header spells it."""
    shape: tuple[int, ...]
    indices: NDArray[np.int64]
    """Ascending, into the flat tensor. Codes are counted: of packed formats bytes, of C64 its halves."""
    values: NDArray[np.unsignedinteger[Any]]
    """The new codes, bit for bit: of BF16 uint16."""


def open_patch(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> Iterator[Change]:
    """Read a patch of any format, tensor by tensor, in bounded memory.

    Parameters
    ----------
    path : path-like
    base : path-like, optional
        The checkpoint that it was made for, which only a flat patch can do without: others say how values move from it.
        The digests of a tensor are compared with its last piece.

    Returns
    -------
    iterator of Change
        Tensors that do not change are left out, and so are blocks that do not; a tensor that is new, or has another
        dtype or shape, comes as a whole.

    Raises
    ------
    OptionError
        The base is needed and not given.
    PatchError
        The patch is damaged, or was made for another base.
    CheckpointError
        Patch or base cannot be read.

    Examples
    --------
    >>> from ckptdiff import patch
    >>> made = patch.make("fixtures/llama/base", "fixtures/llama/tuned", "read.ckptdelta")
    >>> changes = patch.open("read.ckptdelta", "fixtures/llama/base")
    >>> sum(change.indices.size for change in changes)
    39469
    """
    if base is None:
        if patch_kind(path) != "flat":
            raise OptionError("this patch says how values move from the base's", expected="the base", file=path)
        flat = read_flat(path)
        with open_regular(flat.shard.path) as (descriptor, _):
            for name, one in flat.tensors.items():
                start = 0
                for at, new in changes_of_flat(flat, name, descriptor):
                    if at.size:
                        yield Change(name, one.values.dtype, one.shape, at + start, new)
                    start += BLOCK_CODES
        return
    with open_chain(base, [path], None) as chain, open_shards("pread") as shards:
        unchanged = chain.unchanged_names()
        for name, tensor in chain.tensors.items():
            for place in range(0 if name in unchanged else tensor.blocks):
                code = f"<u{tensor.coding.width}"
                after = np.empty(chain.size_of([(name, place)]), np.uint8)
                before = chain.block(shards, name, place, after, keep=True)
                new = after.view(code)
                at = np.arange(new.size) if before is None else np.flatnonzero(before.view(code) != new)
                if at.size:
                    yield Change(name, tensor.dtype, tensor.shape, at + place * BLOCK_CODES, new[at])
