"""Measure on a GPU for one thread: spans of blocks into launches, and what they leave into records."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import closing
from functools import partial as bind
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.errors import DeviceError
from ckptdiff.formats import Formats
from ckptdiff.measure.cuda.batch import Rows, UnreadableError, groups
from ckptdiff.measure.cuda.gpu import Buffer, Gpu
from ckptdiff.measure.cuda.layout import (
    DEVICE_TILE,
    REFINE_BINS,
    ROWS,
    add_refined,
    add_scanned,
    scan_settings,
    search_settings,
)
from ckptdiff.measure.cuda.pipeline import Flight, Launch, LaunchWork, Part, Pipeline
from ckptdiff.measure.cuda.slots import Room
from ckptdiff.measure.partial import BINS, Partial, Refined, Rule, Scan, Targets
from ckptdiff.measure.ranks import ranks_of
from ckptdiff.measure.records import Records
from ckptdiff.measure.source import ByteArray, SmallPairs, Source, Window, read_runs

_DECODED = DEVICE_TILE // 4
"""Coordinates for each block of threads that decodes."""

logger = logging.getLogger("ckptdiff.cuda")


class CudaBackend:
    """Measures spans on a GPU; the methods are those of :class:`~ckptdiff.measure.cpu.CpuBackend`.

    Its buffers are as large as ``room`` says, and smaller where memory does not suffice.
    """

    decodes = True

    def __init__(self, gpu: Gpu, room: Room) -> None:
        self._gpu = gpu
        self._pipeline = open_pipeline(gpu, room)
        self._mask = np.zeros(0, np.uint8)
        self._small = Partial()

    def scan(self, scan: Scan, source: Source, partial: Partial, first_tie: int = 0) -> NDArray[np.uint8] | None:
        """Measure a span of blocks; see :meth:`ckptdiff.measure.cpu.CpuBackend.scan`."""
        partial.open_blocks(0, len(scan.thresholds))
        mask = self._room_for_mask(source.numel if scan.want_mask else 0)
        sums, written = [], 0
        with closing(self._pipeline.carry_out(self._scan_work(scan), self._jobs(scan, source, first_tie))) as landings:
            for landed in landings:
                sums.append(landed.sums[0].copy())
                for bits in landed.masks:
                    mask[written : written + bits.size] = bits
                    written += bits.size
                if landed.job.closes:
                    add_scanned(scan, source.numel, landed.records[0], np.concatenate(sums), landed.bins, partial)
                    coded = landed.job.parts[0].coded
                    if coded is not None and coded.counts:
                        coded.found(*landed.records[0]["kept"].tolist())
        return mask if scan.want_mask else None

    def scan_small(
        self, scan: Scan, pairs: SmallPairs, records: Records
    ) -> tuple[int, NDArray[np.uint8], NDArray[np.int64]]:
        """Measure whole tensors of at most a block, many with one launch.

        Parameters are those of :meth:`ckptdiff.measure.cpu.CpuBackend.scan_small`.
        """
        numel = pairs.numel
        words = -(-numel // 64)
        starts = 8 * (np.cumsum(words) - words)
        mask = self._room_for_mask(64 * int(words.sum()) if scan.want_mask else 0)
        rows = Rows(scan, numel, ranks_of(numel), records)
        jobs, waiting = itertools.tee(groups(scan, pairs, self._pipeline.room))
        group, sums, at = next(waiting), list[NDArray[np.float64]](), 0
        try:
            all_jobs = (job for one in jobs for job in one.jobs)
            with closing(self._pipeline.carry_out(self._scan_work(scan), all_jobs)) as landings:
                for landed in landings:
                    for part, bits in zip(landed.job.parts, landed.masks, strict=False):
                        first = int(starts[group.rows[part.record]]) + (0 if landed.job.opens else at)
                        mask[first : first + bits.size] = bits
                        at = bits.size + (0 if landed.job.opens else at)
                    sums += [tiles.copy() for tiles in landed.sums]
                    if landed.job.closes:
                        rows.take(group, sums, landed, self._small)
                        group, sums = next(waiting, group), []
        except UnreadableError as error:
            return error.row, mask, starts
        return len(numel), mask, starts

    def refine(self, scan: Scan, targets: Targets, source: Source, refined: Refined) -> None:
        """Look for open cuts in a span; see :meth:`ckptdiff.measure.cpu.CpuBackend.refine`."""
        sums = []
        work = self._refine_work(scan, targets)
        with closing(self._pipeline.carry_out(work, self._jobs(scan, source))) as landings:
            for landed in landings:
                sums.append(landed.sums[0].copy())
                if landed.job.closes:
                    add_refined(targets, source.numel, landed.records[0], np.concatenate(sums), landed.bins, refined)

    def _scan_work(self, scan: Scan) -> LaunchWork:
        settings, formats, gpu, run = scan_settings(scan), scan.formats, self._gpu, self._pipeline.run

        def launch(flight: Flight, bins: Any) -> None:
            slot, totals, job = flight.slot, flight.totals, flight.job
            blocks, count = min(flight.tiles, 2 * gpu.processors), np.uint32(flight.tiles)
            mask = slot.down if scan.want_mask else None
            given = [slot.up, count, settings, *self._values(formats, flight), mask]
            gpu.launch(formats, "scan", blocks, [*given, slot.down, totals.records, bins], run)
            if scan.rule == Rule.TOP and scan.ties:
                begins = np.uint32(job.opens), np.uint64(job.first_tie)
                ordinals = [slot.down, count, *begins, slot.first_ties, self._pipeline.next_tie]
                gpu.launch(formats, "place_ties", 1, ordinals, run)
                gpu.launch(formats, "take_ties", blocks, [*given, slot.first_ties, totals.records], run)

        return LaunchWork(formats, launch, ROWS * BINS, scan.want_mask)

    def _refine_work(self, scan: Scan, targets: Targets) -> LaunchWork:
        settings = search_settings(scan.compare, targets)
        formats, gpu, run = scan.formats, self._gpu, self._pipeline.run

        def launch(flight: Flight, bins: Any) -> None:
            slot, count = flight.slot, flight.tiles
            given = [slot.up, np.uint32(count), settings, *self._values(formats, flight)]
            blocks = min(count, 2 * gpu.processors)
            gpu.launch(formats, "refine", blocks, [*given, slot.down, flight.totals.records, bins], run)

        rows = len(targets.deltas) + 2 * len(targets.weights)
        return LaunchWork(formats, launch, rows * REFINE_BINS, False)

    def _values(self, formats: Formats, flight: Flight) -> tuple[Buffer, Buffer]:
        """Both sides as values, once codes with scales are decoded; places of tiles count from what is returned."""
        (part, *_), (base, tuned), up = flight.job.parts, flight.job.coded, flight.slot.up
        if part.coded is None:
            return up, up
        room = self._pipeline.values
        decoded = room[0] if base else None, room[1] if tuned else None
        blocks = -(-part.numel // _DECODED)
        stored = [up[place:] for place in flight.sides]
        given = [*stored, *decoded, np.uint32(part.coded.counts), flight.totals.records]
        self._gpu.launch(formats, "decode", blocks, given, self._pipeline.run)
        return room[0] if base else up, room[1] if tuned else up

    def _jobs(self, scan: Scan, source: Source, first_tie: int = 0) -> Iterator[Launch]:
        """One group: the span, cut into launches."""
        room = self._pipeline.room
        for window in source.windows():
            step, coded = room.coordinates(max(scan.base.bits, scan.tuned.bits)), window.coded
            while coded is not None and step > DEVICE_TILE and coded.most_bytes(step) > room.side_bytes:
                step = max(step // 2 // DEVICE_TILE, 1) * DEVICE_TILE
            for first in range(window.first, window.stop, step):
                stop = min(first + step, window.stop)
                if coded is None:
                    read, shared = bind(_read, scan, source, window, first), window.tuned is window.base
                else:
                    read, shared = bind(coded.read, first, stop), False
                part = Part(0, stop - first, read, shared, coded)
                yield Launch((part,), opens=first == 0, closes=stop == source.numel, first_tie=first_tie)

    def _room_for_mask(self, numel: int) -> NDArray[np.uint8]:
        size = -(-numel // 8)
        if self._mask.size < size:
            self._mask = np.zeros(size, np.uint8)
        return self._mask[:size]


def open_pipeline(gpu: Gpu, room: Room) -> Pipeline:
    """Take room on the GPU and on the host, less where there is not as much; DeviceError if none is small enough."""
    wanted: Room | None = room
    while wanted is not None:
        on_gpu, on_host = wanted.gpu_bytes >> 20, wanted.host_bytes >> 20
        try:
            return Pipeline(gpu, wanted)
        except MemoryError as error:
            wanted, found = wanted.halved(), str(error)
        if wanted is not None:
            logger.warning(
                "%d MiB of GPU memory are not free, or %d MiB of host memory cannot be page-locked; trying with half",
                on_gpu,
                on_host,
            )
    raise DeviceError(
        "there is too little free GPU memory, or host memory that can be page-locked",
        expected=f"{on_gpu} MiB, and {on_host} MiB",
        found=found or None,
        hint="close what else uses the GPU (nvidia-smi lists it), fewer --threads, or --device cpu",
    )


def _read(scan: Scan, source: Source, window: Window, first: int, *rooms: ByteArray) -> None:
    """Read both sides of coordinates of a window from ``first`` on, as many as there is room for."""
    sides = (window.base, scan.base), (window.tuned, scan.tuned)
    for (runs, stored), room in zip(sides, rooms, strict=False):
        if not read_runs(runs, first, stored.bits, room):
            source.fail(first, first + room.size * 8 // stored.bits)
