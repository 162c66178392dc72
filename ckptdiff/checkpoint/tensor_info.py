"""Say where a tensor lies and what it is: the records that every way to store tensors becomes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TypeAlias

from ckptdiff.checkpoint.dtypes import DTYPES, Kind
from ckptdiff.remote.remote_file import RemoteFile, number_of

__all__ = ["ELSEWHERE", "Kinds", "Shard", "Slice", "TensorInfo", "bytes_of", "kinds_of"]

ELSEWHERE = -1
"""In place of a device: what follows is the hash of a file's bytes."""

Kinds: TypeAlias = Counter[tuple[str, tuple[int, ...]]]
"""Numbers of tensors by dtype and shape: of these a checkpoint has few, however many tensors."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of tensors, as it was when its header was read.

    Attributes
    ----------
    path : str
        As the user can find it: the path given, or the folder given joined with the file's name.
    size : int
        Length of the whole file, in bytes.
    mtime_ns : int
        Time of its last modification, in nanoseconds since the epoch.
    device, inode : int
        Which file it is, however many names lead to it.
    header_sha256 : str
        SHA-256 of the file's first ``8 + header length`` bytes, in hexadecimal. Of a file that torch wrote: of its
        directories, which hold a checksum of each tensor, and of its pickles.
    metadata : mapping of str to str
        The header's ``__metadata__``; empty if there is none.
    remote : RemoteFile or None
        Where it is and what it was there, if it is no local file; ``device`` and ``inode`` then tell its content.
    content : str
        The hash of its bytes by the word of the hub that it is from; empty if none is known.
    """

    path: str
    size: int
    mtime_ns: int
    device: int
    inode: int
    header_sha256: str
    metadata: Mapping[str, str] = field(hash=False)
    remote: RemoteFile | None = None
    content: str = ""

    @property
    def place(self) -> tuple[int, int]:
        """``(device, inode)``, or what stands for them where the hash of its bytes is known."""
        return (ELSEWHERE, number_of(self.content)) if self.content else (self.device, self.inode)


@dataclass(frozen=True, slots=True)
class Slice:
    """A box of a tensor, as one file stores it.

    Attributes
    ----------
    shard : Shard
        The file.
    start : int
        The byte of it where the first element lies.
    offsets, sizes : tuple of int
        Where the box begins in the tensor, and its shape.
    strides : tuple of int
        How many elements further in the file the next one along each axis lies.
    """

    shard: Shard
    start: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies and what it is.

    Attributes
    ----------
    name : str
        The raw name; it may hold control characters, ``/`` or markup.
    dtype : str
        A key of `DTYPES`.
    shape : tuple of int
        Empty for a scalar.
    shard : Shard
        The file that stores it, or its first slice.
    start, stop : int
        Its bytes in that file: absolute offsets, `stop` excluded. Both are 0 if there are slices.
    slices : tuple of Slice
        Where it lies if not in one run in the order of its elements; each element is in one slice.

    Examples
    --------
    >>> import ckptdiff
    >>> tensor = ckptdiff.open_checkpoint("fixtures/llama/base").tensors["lm_head.weight"]
    >>> tensor.shape, tensor.nbytes == tensor.stop - tensor.start
    ((256, 64), True)
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Shard
    start: int
    stop: int
    slices: tuple[Slice, ...] = field(default=(), hash=False)

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes stored."""
        return self.numel * DTYPES[self.dtype].bits // 8

    @property
    def kind(self) -> Kind:
        """What can be measured on its values."""
        return DTYPES[self.dtype].kind

    @property
    def region(self) -> tuple[object, ...]:
        """``(device, inode, start, stop)`` and slices, by a known hash if any: equal regions are the same bytes."""
        if self.shard.content:
            return (*self.shard.place, self.start, self.stop)
        slices = [(*one.shard.place, one.start, one.offsets, one.strides) for one in self.slices]
        return (*self.shard.place, self.start, self.stop, *slices)


def kinds_of(tensors: Iterable[TensorInfo]) -> Kinds:
    """How many of some tensors there are of each dtype and shape."""
    return Counter(map(attrgetter("dtype", "shape"), tensors))


def bytes_of(kinds: Kinds) -> int:
    """Bytes stored of so many tensors."""
    return sum(count * (math.prod(shape) * DTYPES[dtype].bits // 8) for (dtype, shape), count in kinds.items())
