"""Read and write chunks of datasets as they are stored.

Before 3.16 h5py called HDF5 for this without its lock, which all its other calls take: beside another thread that used
HDF5, even of another file, such a call failed, or ended the process.
"""

from __future__ import annotations

from typing import Any

from h5py._objects import phil

__all__ = ["read_chunk", "write_chunk"]


def read_chunk(dataset: Any, place: tuple[int, ...]) -> tuple[int, bytes]:
    """The filter mask and the stored bytes of the chunk at a place, of a low-level dataset (``dataset.id``)."""
    with phil:
        found: tuple[int, bytes] = dataset.read_direct_chunk(place)
    return found


def write_chunk(dataset: Any, place: tuple[int, ...], payload: bytes, filter_mask: int = 0) -> None:
    """Store bytes as the chunk at a place, of a low-level dataset."""
    with phil:
        dataset.write_direct_chunk(place, payload, filter_mask)
