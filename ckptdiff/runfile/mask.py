"""Read the masks that a run file stores."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from h5py import h5z
from numpy.typing import NDArray

from ckptdiff.errors import RunFileError
from ckptdiff.options import MaskRule
from ckptdiff.runfile.direct_chunks import read_chunk
from ckptdiff.runfile.schema import BIT_ORDER, MASK_CHUNK, escape_name, packed_bytes
from ckptdiff.runfile.typed import shape_of, text_of

Guard: TypeAlias = Callable[..., AbstractContextManager[None]]
IndexArray: TypeAlias = NDArray[np.int32] | NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Mask:
    """The mask of one tensor: which of its coordinates the update changed, by the rule of the run.

    Nothing is read before it is asked for, and :meth:`iter_packed` never holds more than one piece.

    Attributes
    ----------
    name : str
        Name of the tensor in the base.
    shape : tuple of int
        Shape of the tensor.
    count : int
        Coordinates in the mask.

    Examples
    --------
    >>> import ckptdiff
    >>> with ckptdiff.RunFile("run.h5") as run:
    ...     mask = run.masks["lm_head.weight"]
    ...     mask.dense().shape == mask.shape, mask.flat().size == mask.count
    (True, True)
    """

    name: str
    shape: tuple[int, ...]
    count: int
    _dataset: Any = field(repr=False)
    _guard: Guard = field(repr=False)

    @property
    def numel(self) -> int:
        """Coordinates of the tensor."""
        return math.prod(self.shape)

    @property
    def density(self) -> float | None:
        """Share of the coordinates that are in the mask; None for a tensor without coordinates."""
        return self.count / self.numel if self.numel else None

    def packed(self) -> NDArray[np.uint8]:
        """The bits in row-major order, least significant bit first, shape (ceil(numel / 8),)."""
        bits = np.empty(packed_bytes(self.numel), np.uint8)
        start = 0
        for piece in self.iter_packed():
            bits[start : start + piece.size] = piece
            start += piece.size
        return bits

    def dense(self) -> NDArray[np.bool_]:
        """The mask as booleans of the tensor's shape."""
        bits = np.unpackbits(self.packed(), count=self.numel, bitorder=BIT_ORDER)
        return bits.view(np.bool_).reshape(self.shape)

    def flat(self) -> IndexArray:
        """Row-major indices of the coordinates in the mask, ascending, shape (count,).

        Returns
        -------
        int32 or int64 array
            int32 where it can hold every index of the tensor.
        """
        indices: IndexArray = np.concatenate([np.empty(0, self.index_dtype), *self.iter_flat()])
        return indices

    @property
    def index_dtype(self) -> np.dtype[Any]:
        """Type of the indices that :meth:`flat` returns."""
        return np.dtype(np.int32) if self.numel <= 1 << 31 else np.dtype(np.int64)

    def iter_packed(self, size: int = MASK_CHUNK) -> Iterator[NDArray[np.uint8]]:
        """Yield the packed bits in pieces.

        Parameters
        ----------
        size : int
            Bytes of a piece; multiples of the stored chunk of 131072 bytes decompress each chunk once.

        Raises
        ------
        RunFileError
            After the last piece, if they do not hold `count` coordinates.
        """
        seen = 0
        for start in range(0, packed_bytes(self.numel), size):
            with self._guard(tensor=self.name):
                piece = self._read(start, min(start + size, packed_bytes(self.numel)))
            seen += population(piece)
            if 8 * (start + piece.size) > self.numel:
                # The padding bits of the last byte are zero in what ckptdiff writes; others may have written this.
                seen -= int(piece[-1] >> self.numel % 8).bit_count()
            yield piece
        if seen != self.count:
            raise RunFileError(
                "a mask does not hold as many coordinates as the table says",
                file=self._dataset.file.filename,
                tensor=self.name,
                expected=self.count,
                found=seen,
                hint="run ckptdiff diff again",
            )

    def _read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Some of the packed bytes. Chunks are inflated here, since HDF5 would let no other thread read meanwhile."""
        bits: NDArray[np.uint8]
        if not self._only_deflated:
            bits = self._dataset[start:stop]
            return bits
        size = self._dataset.chunks[0]
        bits = np.empty(stop - start, np.uint8)
        for first in range(start // size * size, stop, size):
            chunk = _chunk(self._dataset, first)
            part = slice(max(first, start), min(first + size, stop))
            bits[part.start - start : part.stop - start] = chunk[part.start - first : part.stop - first]
        return bits

    @cached_property
    def _only_deflated(self) -> bool:
        """Whether all of it is in chunks that zlib can read, as ckptdiff writes them; others may write otherwise."""
        dataset, filters = self._dataset, self._dataset.id.get_create_plist()
        if dataset.chunks is None or filters.get_nfilters() != 1 or filters.get_filter(0)[0] != h5z.FILTER_DEFLATE:
            return False
        chunks: int = dataset.id.get_num_chunks()
        return chunks == -(-packed_bytes(self.numel) // int(dataset.chunks[0]))

    def iter_flat(self) -> Iterator[IndexArray]:
        """Yield the row-major indices in pieces, ascending.

        Raises
        ------
        RunFileError
            After the last piece, if they are not `count`.
        """
        start = 0
        for piece in self.iter_packed():
            found = np.flatnonzero(np.unpackbits(piece, bitorder=BIT_ORDER)) + start
            start += 8 * piece.size
            # Without the padding bits of the last byte.
            yield found[: np.searchsorted(found, self.numel)].astype(self.index_dtype)


def _chunk(dataset: Any, first: int) -> NDArray[np.uint8]:
    """The chunk of a deflated dataset that begins at a byte, padding included."""
    size = dataset.chunks[0]
    filter_mask, stored = read_chunk(dataset.id, (first,))
    try:
        bits = stored if filter_mask & 1 else zlib.decompress(stored, bufsize=size)
    except zlib.error as error:
        raise ValueError(f"the chunk at byte {first} of a mask is damaged: {error}") from error
    if len(bits) != size:
        raise ValueError(f"the chunk at byte {first} of a mask holds {len(bits)} bytes, not {size}")
    return np.frombuffer(bits, np.uint8)


def population(bits: NDArray[np.uint8]) -> int:
    """How many bits are set."""
    whole = bits.size // 8 * 8
    words = np.bitwise_count(bits[:whole].view(np.uint64)).sum(dtype=np.int64)
    return int(words + np.bitwise_count(bits[whole:]).sum(dtype=np.int64))


class MaskView(Mapping[str, Mask]):
    """The masks of a run file by tensor name, in plan order; empty if the rule is ``none``.

    Attributes
    ----------
    rule : MaskRule
        Which coordinates are in the masks.
    compare : str
        "bf16" or "stored".
    """

    def __init__(self, group: Any, counts: Mapping[str, int], guard: Guard) -> None:
        self._group = group
        self._guard = guard
        with guard():
            self.rule = MaskRule.parse(text_of(group, "rule"))
            self.compare = text_of(group, "compare")
        self._counts = {} if self.rule.kind == "none" else counts

    def __getitem__(self, name: str) -> Mask:
        count = self._counts[name]
        with self._guard(tensor=name):
            dataset = self._group[escape_name(name)]
            shape = shape_of(dataset)
        expected = (packed_bytes(math.prod(shape)),)
        if dataset.shape != expected or dataset.dtype != np.uint8:
            raise RunFileError(
                "a mask does not fit its tensor",
                file=self._group.file.filename,
                tensor=name,
                expected=f"uint8 of {expected}",
                found=f"{dataset.dtype} of {dataset.shape}",
            )
        return Mask(name, shape, count, dataset, self._guard)

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)
