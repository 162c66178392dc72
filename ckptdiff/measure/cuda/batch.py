"""Measure whole small tensors: as many in a launch as there is room for, and a row of figures from what each left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial as bind

import numpy as np
from numpy.typing import NDArray

from ckptdiff.measure.cuda.layout import add_scanned, split_bins
from ckptdiff.measure.cuda.pipeline import Landed, Launch, Part
from ckptdiff.measure.cuda.slots import Room
from ckptdiff.measure.kernels.row import fill_row
from ckptdiff.measure.kernels.tiles import totals_of
from ckptdiff.measure.partial import Partial, Scan
from ckptdiff.measure.ranks import tables_of
from ckptdiff.measure.records import Records
from ckptdiff.measure.source import ByteArray, SmallPairs, read_runs


class UnreadableError(Exception):
    """The files of a row could not be read."""

    def __init__(self, row: int) -> None:
        self.row = row
        super().__init__(row)


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive tensors that share a launch, or one that takes several launches."""

    rows: range
    jobs: tuple[Launch, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the figures go; see :meth:`ckptdiff.measure.cpu.CpuBackend.scan_small`."""

    scan: Scan
    numel: NDArray[np.int64]
    ranks: tuple[NDArray[np.int64], NDArray[np.int64]]
    records: Records

    def take(self, group: Group, sums: list[NDArray[np.float64]], landed: Landed, partial: Partial) -> None:
        """Fill the rows of a group that is complete; ``partial`` holds nothing, and is left so."""
        if len(group.jobs) > 1:
            sums = [np.concatenate(sums)]
        bins = split_bins(landed.bins, len(group.rows))
        for record, row in enumerate(group.rows):
            partial.open_blocks(0, len(self.scan.thresholds))
            add_scanned(self.scan, int(self.numel[row]), landed.records[record], sums[record], bins[record], partial)
            fill_row(totals_of(partial, 1), self.ranks, tables_of(self.scan.compare), row, self.records)
            partial.clear()


def groups(scan: Scan, pairs: SmallPairs, room: Room) -> Iterator[Group]:
    """Cut tensors into groups, in order."""
    widest = max(scan.base.bits, scan.tuned.bits)
    first, free = 0, room.limits()
    for row, numel in enumerate(pairs.numel.tolist()):
        needs = room.needs(numel, widest)
        if _fit(needs, free):
            free = tuple(left - need for left, need in zip(free, needs, strict=True))
            continue
        if first < row:
            yield _together(scan, pairs, range(first, row))
        first, free = row, room.limits()
        if _fit(needs, free):
            free = tuple(left - need for left, need in zip(free, needs, strict=True))
        else:
            yield _alone(scan, pairs, row, room.coordinates(widest))
            first = row + 1
    if first < len(pairs.numel):
        yield _together(scan, pairs, range(first, len(pairs.numel)))


def _fit(needs: tuple[int, ...], free: tuple[int, ...]) -> bool:
    return all(need <= left for need, left in zip(needs, free, strict=True))


def _together(scan: Scan, pairs: SmallPairs, rows: range) -> Group:
    parts = tuple(
        Part(record, int(pairs.numel[row]), bind(_read, scan, pairs, row, 0)) for record, row in enumerate(rows)
    )
    return Group(rows, (Launch(parts),))


def _alone(scan: Scan, pairs: SmallPairs, row: int, step: int) -> Group:
    numel = int(pairs.numel[row])
    jobs = []
    for first in range(0, numel, step):
        part = Part(0, min(step, numel - first), bind(_read, scan, pairs, row, first))
        jobs.append(Launch((part,), opens=first == 0, closes=first + step >= numel))
    return Group(range(row, row + 1), tuple(jobs))


def _read(scan: Scan, pairs: SmallPairs, row: int, first: int, *rooms: ByteArray) -> None:
    """Read both sides of a tensor from coordinate ``first`` on."""
    for runs, stored, room in zip((pairs.base, pairs.tuned), (scan.base, scan.tuned), rooms, strict=True):
        if not read_runs(runs[row : row + 1], first, stored.bits, room):
            raise UnreadableError(row)
