"""Make a plan of two paths: open, pair, choose what each pair is measured as, and fit it into memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import DTYPES, Checkpoint, Kind, Pairing, TensorPair, open_checkpoint, pair
from ckptdiff.checkpoint.boxes import is_contiguous, room_to_read, runs_of
from ckptdiff.checkpoint.layout_halves import unusual_halves
from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.checkpoint.region import read_numel
from ckptdiff.checkpoint.same_values import look_for_ties, sampled_agreement, sampled_likeness
from ckptdiff.checkpoint.weights import Assembled, CommonPart, Decoded, Weight, sources_of, stored_as
from ckptdiff.errors import plural
from ckptdiff.events import Listener, ignore
from ckptdiff.figures.columns import Measured, measured
from ckptdiff.figures.result import Diff
from ckptdiff.formats import Formats, formats_of, is_wide
from ckptdiff.measure.partial import BLOCK
from ckptdiff.measure.passes import BitMeasurement, FloatMeasurement, Measurement, one_scan_suffices
from ckptdiff.measure.records import Records
from ckptdiff.memory import DEFAULT_MEMORY, peak_resident, resident, room_to_grow
from ckptdiff.options import Options, default_threads
from ckptdiff.run.coded_pair import goes_as_codes, room_to_send
from ckptdiff.run.devices import Device, open_device
from ckptdiff.run.facts import facts_of_run
from ckptdiff.run.tasks import GRAIN, Grain, Load, Memory, Span, fit_memory
from ckptdiff.run.warm_up import Uses, uses
from ckptdiff.runfile.check_target import check_target
from ckptdiff.runfile.schema import mask_chunk_bytes

if TYPE_CHECKING:
    from ckptdiff.spectra.spectra_gpu import SpectraGpu
    from ckptdiff.spectra.stage import SpectraPlan

__all__ = ["Plan", "prepare"]


class Coordinates(NamedTuple):
    """Of k pairs; shape (k,)."""

    numel: NDArray[np.int64]
    """How many."""
    valued: NDArray[np.bool_]
    """Whether they have values, and not bits alone."""
    wide: NDArray[np.bool_]
    """Whether a side is stored wider than what it is compared as."""


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes
    ----------
    pairs : tuple of TensorPair
        In plan order.
    loads : tuple of Load
        What each pair asks of reader and memory.
    diff : Diff
        Every fact that needs no data; its columns have length zero.
    memory : Memory
        Of the coordinate pass.
    spectra : SpectraPlan or None
        If spectra are measured after it.
    io : str
        "mmap" or "pread".
    device : Device
    options : Options
    want_masks : bool
        Whether a run file with masks is written.
    grain : Grain
    spectra_gpu : SpectraGpu or None
        The GPU that measures spectra; None if the processor does.
    """

    pairs: tuple[TensorPair, ...]
    loads: tuple[Load, ...]
    diff: Diff
    memory: Memory
    spectra: SpectraPlan | None
    io: str
    device: Device
    options: Options
    want_masks: bool
    grain: Grain = GRAIN
    spectra_gpu: SpectraGpu | None = None

    @property
    def tensors(self) -> int:
        """Tensor pairs to compare."""
        return len(self.pairs)

    @property
    def total_bytes(self) -> int:
        """Bytes to read, both sides."""
        return sum(load.nbytes for load in self.loads)

    @property
    def threads(self) -> int:
        """Worker threads."""
        return self.memory.threads

    @property
    def threads_note(self) -> str:
        """Why fewer threads work than were wanted, in words; empty if all do."""
        wanted = self.options.threads or default_threads()
        on_device = min(wanted, self.device.threads or wanted)
        if self.threads < on_device:
            least = f"{-(-self.memory.of(on_device) >> 20)}M for {on_device}"
            return f"memory holds {self.threads} of {wanted} threads; --max-memory {least}"
        return f"--gpu-memory holds {self.threads} of {wanted} threads" if self.threads < wanted else ""

    @property
    def decoding_note(self) -> str:
        """Who decodes quantised weights, in words; empty where that is the processor alone."""
        sources = ((*sources_of(pair.base), *sources_of(pair.tuned)) for pair in self.pairs)
        quantised = sum(any(isinstance(source, Decoded) for source in some) for some in sources)
        if not quantised or not self.device.decodes:
            return ""
        there = sum(goes_as_codes(pair.base, pair.tuned) for pair in self.pairs)
        who = {self.device.name: there, "the processor": quantised - there}
        decoded = (f"of {plural(count, 'pair')} by {name}" for name, count in who.items() if count)
        return f"quantised weights are decoded {', '.join(decoded)}"

    @property
    def chunk_bytes(self) -> int:
        """Bytes that the largest task reads."""
        return max((load.span_bytes(Span(0, 0, min(load.blocks, self.grain.blocks))) for load in self.loads), default=0)

    @property
    def projected_memory(self) -> int:
        """Projected peak resident size of the process, in bytes."""
        spectra = self.spectra.projected_memory if self.spectra else 0
        return max(self.memory.projected, spectra, peak_resident())

    @property
    def max_memory(self) -> int:
        """The bound it was fitted into, in bytes."""
        spectra = self.spectra.max_memory if self.spectra else 0
        return self.options.max_memory or max(DEFAULT_MEMORY, spectra, self.projected_memory)

    @property
    def mostly_small(self) -> bool:
        """Whether there are very many tensors, of 64 Ki coordinates at most on average."""
        return len(self.loads) >= self.grain.many and sum(load.numel for load in self.loads) <= len(self.loads) << 16

    def formats(self, index: int) -> Formats | None:
        """Formats of one pair of floating tensors; None of integer and opaque ones."""
        base, tuned = self.pairs[index].base, self.pairs[index].tuned
        return formats_of(base.dtype, tuned.dtype, self.options.compare) if base.kind is Kind.FLOAT else None

    def measurement(self, index: int, want_mask: bool) -> Measurement:
        """A fresh measurement of one pair, that makes its mask or only counts it."""
        base, formats, rule = self.pairs[index].base, self.formats(index), self.options.mask
        if formats is None:
            return BitMeasurement(DTYPES[base.dtype].bits, rule, want_mask)
        return FloatMeasurement(formats, base.numel, rule, want_mask)

    def measured(self, tensors: range, records: Records) -> Measured:
        """What is stored of consecutive pairs, from their rows."""
        return measured(records, *self.coordinates(tensors), self.options.mask)

    def coordinates(self, tensors: range) -> Coordinates:
        """What is known of the coordinates of consecutive pairs before they are read."""
        part, every = slice(tensors.start, tensors.stop), self._coordinates
        return Coordinates(every.numel[part], every.valued[part], every.wide[part])

    @cached_property
    def _coordinates(self) -> Coordinates:
        dtypes = [(pair.base.dtype, pair.tuned.dtype) for pair in self.pairs]
        known = dict.fromkeys(dtypes, (False, False))
        for base, tuned in known:
            if DTYPES[base].kind is Kind.FLOAT:
                *sides, compare = formats_of(base, tuned, self.options.compare)
                known[base, tuned] = True, any(is_wide(side, compare) for side in sides)
        valued, wide = (np.array([known[both][which] for both in dtypes], bool) for which in (0, 1))
        return Coordinates(np.array([load.numel for load in self.loads], np.int64), valued, wide)


def prepare(
    base: str,
    tuned: str,
    *,
    out: Path | None = None,
    options: Options | None = None,
    tell: Listener = ignore,
    read_data: bool = True,
    grain: Grain = GRAIN,
) -> Plan:
    """Make the plan of a run. Reads headers and indexes, and no data but heads that one side lacks, and samples.

    Parameters
    ----------
    base, tuned : str
        Paths of the checkpoints.
    out : Path, optional
        Run file to be written; without one no masks are made.
    options : Options, optional
    tell : callable, optional
        Told if kernels have to be compiled first.
    read_data : bool
        Whether to read those heads, the embeddings that they may be, and those samples; else ``config.json`` alone
        tells which are tied, fewer rules are proposed, and nothing is said of halves that look swapped. The pairs are
        the same.
    grain : Grain, optional

    Raises
    ------
    CkptdiffError
        If a checkpoint is damaged, nothing can be compared, the output cannot be written, memory does not suffice, or
        spectra are asked for and SciPy is missing.
    """
    options = options or Options()
    if options.spectra is not None:
        from ckptdiff.linalg.blas import require_scipy

        require_scipy()
    sides = open_checkpoint(base), open_checkpoint(tuned)
    if out is not None:
        check_target(out, [(shard.path, shard.device, shard.inode) for side in sides for shard in side.shards])
    pairing = _paired(*sides, options, tell, read_data)
    device = open_device(options)
    want_masks = out is not None and options.mask.kind != "none"
    # Reads into a cached buffer cost less than mapping pages and dropping them again, and report a lost page.
    io = "pread" if options.io == "auto" else options.io
    loads = _loads(pairing.pairs, options, device, io, grain)
    asked = _uses(pairing, loads, options, want_masks)
    device.warm_up(asked, tell)
    if read_data and pairing.orders:
        # Once the kernels that read pieces are there.
        with open_shards("pread") as shards:
            halves = unusual_halves(pairing.pairs, pairing.orders, sampled_likeness(shards))
            pairing = replace(pairing, warnings=(*pairing.warnings, *halves))
    diff = facts_of_run(*sides, pairing, options)
    threads = min(options.threads or default_threads(), device.threads or sys.maxsize)
    default, baseline = DEFAULT_MEMORY + device.overhead, resident()
    memory = fit_memory(
        loads, threads, options.max_memory, default, room_to_grow(baseline), baseline, want_masks, grain
    )
    spectra = gpu = None
    if options.spectra is not None:
        from ckptdiff.spectra.spectra_gpu import open_spectra_gpu
        from ckptdiff.spectra.stage import plan_spectra

        gpu = open_spectra_gpu(options, options.spectra.mode, tell)
        spectra = plan_spectra(pairing.pairs, options, memory.baseline + memory.results, gpu)
    return Plan(pairing.pairs, loads, diff, memory, spectra, io, device, options, want_masks, grain, gpu)


def _paired(base: Checkpoint, tuned: Checkpoint, options: Options, tell: Listener, read_data: bool) -> Pairing:
    with open_shards("pread") as shards:
        return pair(
            base,
            tuned,
            renames=options.renames,
            include=options.include,
            exclude=options.exclude,
            same_values=look_for_ties(shards, tell) if read_data else None,
            values=options.values,
            agreement=sampled_agreement(shards) if read_data else None,
        )


def _uses(pairing: Pairing, loads: tuple[Load, ...], options: Options, want_masks: bool) -> Uses:
    pairs = pairing.pairs
    alike: set[Formats] = set()
    alone: set[Formats] = set()
    kinds = {(one.base.dtype, one.tuned.dtype, load.kind is None) for one, load in zip(pairs, loads, strict=True)}
    for base, tuned, by_itself in kinds:
        if DTYPES[base].kind is Kind.FLOAT:
            (alone if by_itself else alike).add(formats_of(base, tuned, options.compare))
    others = [side for one in pairs if not one.stored for side in (one.base, one.tuned)]
    decoded = any(isinstance(source, Decoded) for side in others for source in sources_of(side))
    in_boxes = pairing.orders or not all(map(is_contiguous, others))
    reading = ["decoded"] if decoded else ["boxes"] if in_boxes else []
    mask_chunk = mask_chunk_bytes(max((math.prod(one.shape) for one in pairs), default=0)) if want_masks else 0
    return uses(alike, alone, mask_chunk, reading)


def _loads(pairs: tuple[TensorPair, ...], options: Options, device: Device, io: str, grain: Grain) -> tuple[Load, ...]:
    shared: dict[Hashable, Load] = {}
    asked = [
        (*_reading(one.base), *_reading(one.tuned), one.base.numel, one.same_bytes, one.rows is None) for one in pairs
    ]
    for what, one in zip(asked, pairs, strict=True):
        if what not in shared:
            shared[what] = _load(one, options, device)
    if not device.batches or io != "pread" or sum(shared[what].kind is not None for what in asked) < grain.many:
        shared = {what: replace(load, kind=None) for what, load in shared.items()}
    return tuple(shared[what] for what in asked)


def _load(pair: TensorPair, options: Options, device: Device) -> Load:
    same, numel = pair.same_bytes, pair.base.numel
    sides: list[Weight] = [pair.base] if same else [pair.base, pair.tuned]
    # Of codes with scales, what they take together.
    bits = tuple(8 * side.nbytes // max(numel, 1) for side in sides)
    if device.decodes and goes_as_codes(pair.base, pair.tuned):
        reading = room_to_send(pair.base, pair.tuned, min(numel, BLOCK))
    else:
        reading = sum(room_to_read(side, min(numel, BLOCK)) for side in sides)
    if pair.base.kind is not Kind.FLOAT:
        return Load(numel, bits, reading + min(numel, BLOCK) * 4)
    formats = formats_of(pair.base.dtype, pair.tuned.dtype, options.compare)
    alike = not same and 0 < numel <= BLOCK and one_scan_suffices(formats[2], options.mask)
    alike = (
        alike and pair.rows is None and all(is_contiguous(side) and len(runs_of(side, 0, numel)) == 1 for side in sides)
    )
    return Load(numel, bits, reading + device.scratch(numel), formats if alike else None)


def _reading(side: Weight) -> tuple[Hashable, ...]:
    """What tells how a side is read, beside its size."""
    if isinstance(side, Decoded):
        return stored_as(side), (side.shape, side.block)
    if isinstance(side, CommonPart):
        return *_reading(side.whole), side.whole.numel, read_numel(side.region)
    if isinstance(side, Assembled):
        return side.dtype, is_contiguous(side) and len(runs_of(side, 0, side.numel))
    return stored_as(side), True
