"""Sum up what jobs give: counts, squares and products of every tensor that is followed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptdiff.measure.kernels.tiles import facts_of
from ckptdiff.track.kernels.products import TRACK_TILE, in_sample
from ckptdiff.track.kernels.trajectory import Flow, Rooms, follow_spans, new_rooms
from ckptdiff.track.plan import Followed

__all__ = ["FollowedSums", "JobSums", "ThreadRooms", "sum_spans"]


@dataclass(frozen=True, eq=False, slots=True)
class JobSums:
    """Counts and sums of the spans of a job."""

    tensors: NDArray[np.int64]
    """Of each span."""
    counts: NDArray[np.int64]
    """Shape (spans, steps, len(Flow))."""
    squares: NDArray[np.float64]
    """Shape (spans, 1 + steps)."""
    products: NDArray[np.float64]
    """Shape (spans, kinds, pairs)."""


@dataclass(frozen=True, eq=False, slots=True)
class FollowedSums:
    """Counts and sums of all tensors."""

    counts: NDArray[np.int64]
    """Shape (tensors, steps, len(Flow))."""
    squares: NDArray[np.float64]
    """Sums of W0^2, then of (W - W0)^2 at each step; shape (tensors, 1 + steps)."""
    products: NDArray[np.float64]
    """Sums of (W - W0)(W' - W0), then of their squares; shape (tensors, kinds, pairs), pairs (0, 0), (1, 0), (1, 1),
    (2, 0), ..."""

    @classmethod
    def of(cls, tensors: int, steps: int, kinds: int) -> FollowedSums:
        """Zeros."""
        return cls(
            np.zeros((tensors, steps, len(Flow)), np.int64),
            np.zeros((tensors, 1 + steps)),
            np.zeros((tensors, kinds, steps * (steps + 1) // 2)),
        )

    def add(self, found: JobSums) -> None:
        """Add what a job gave; in the order of jobs, so that no digit depends on threads."""
        np.add.at(self.counts, found.tensors, found.counts)
        np.add.at(self.squares, found.tensors, found.squares)
        np.add.at(self.products, found.tensors, found.products)

    def scale(self, tensors: Sequence[Followed], every: int) -> None:
        """Let products of one tile in so many stand for all."""
        if every > 1:
            scales = [_scale(followed.sides[0].numel, every) for followed in tensors]
            self.products[:] *= np.array(scales)[:, np.newaxis, np.newaxis]


def _scale(numel: int, every: int) -> float:
    """How many coordinates of a tensor stand behind one that is sampled."""
    firsts = np.arange(0, numel, TRACK_TILE)
    sampled = np.minimum(numel - firsts[in_sample(firsts // TRACK_TILE, every)], TRACK_TILE).sum()
    return float(numel / sampled) if sampled else 1.0


class ThreadRooms:
    """Work space of each thread, for so many checkpoints and kinds of products."""

    def __init__(self, sides: int, kinds: int) -> None:
        self._sides, self._kinds, self._local = sides, kinds, threading.local()

    def of(self, code: np.dtype[np.unsignedinteger]) -> Rooms:
        """That of this thread for a dtype of codes."""
        held: dict[int, Rooms] | None = getattr(self._local, "held", None)
        if held is None:
            held = self._local.held = {}
        if code.itemsize not in held:
            held[code.itemsize] = new_rooms(code, self._sides, self._kinds)
        return held[code.itemsize]


def sum_spans(
    alike: Followed, spans: NDArray[np.int64], files: NDArray[np.int64], rooms: ThreadRooms, every: int
) -> tuple[JobSums, int]:
    """Follow spans of tensors of the same dtypes.

    Parameters
    ----------
    alike : Followed
        One of them.
    spans, files
        As :func:`~ckptdiff.track.kernels.trajectory.follow_spans` takes them.

    Returns
    -------
    JobSums
        Of the numbers in `spans`.
    int
        How many spans were followed: less than all if the next could not be read.
    """
    _, tables = alike.casts()
    room = rooms.of(alike.code_dtype)
    found = JobSums(
        spans[:, 0].copy(),
        np.zeros((len(spans), files.shape[1] - 1, len(Flow)), np.int64),
        np.zeros((len(spans), files.shape[1])),
        np.zeros((len(spans), *room.products.shape[:2])),
    )
    values, magnitude = facts_of(alike.compare).values, alike.code_dtype.type(alike.compare.magnitude)
    sums = found.counts, found.squares, found.products
    return found, follow_spans(spans, files, tables, values, magnitude, room, *sums, every)
