"""Make a plan of two paths: open, pair, choose what each pair is measured as, and fit it into memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import DTYPES, Checkpoint, Kind, Pairing, Shard, TensorPair, open_pair, pair
from ckptdiff.checkpoint.boxes import is_contiguous
from ckptdiff.checkpoint.layout_halves import unusual_halves
from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.checkpoint.same_values import look_for_ties, sampled_agreement, sampled_likeness
from ckptdiff.checkpoint.weights import Decoded, sources_of
from ckptdiff.errors import plural
from ckptdiff.events import Listener, Note, ignore
from ckptdiff.figures.columns import Measured, measured
from ckptdiff.figures.result import Diff
from ckptdiff.files.unfinished import Saving
from ckptdiff.formats import Formats, formats_of, is_wide
from ckptdiff.measure.partial import BLOCK
from ckptdiff.measure.passes import BitMeasurement, FloatMeasurement, Measurement
from ckptdiff.measure.records import Records
from ckptdiff.memory import DEFAULT_MEMORY, peak_resident, resident, room_to_grow
from ckptdiff.options import Options, default_threads
from ckptdiff.remote.hub import is_hub_name, may_be_hub
from ckptdiff.run.coded_pair import goes_as_codes
from ckptdiff.run.devices import Device, open_device
from ckptdiff.run.facts import facts_of_run
from ckptdiff.run.loads import loads_of
from ckptdiff.run.shard_source import most_fetched, remote_parts
from ckptdiff.run.tasks import FETCHED, GRAIN, Grain, Load, Memory, Span, SpanTask, fit_memory
from ckptdiff.run.warm_up import Uses, uses
from ckptdiff.runfile.check_target import check_target
from ckptdiff.runfile.compress import ENCODED
from ckptdiff.runfile.schema import mask_chunk_bytes

if TYPE_CHECKING:
    from ckptdiff.spectra.spectra_gpu import SpectraGpu
    from ckptdiff.spectra.stage import SpectraPlan

__all__ = ["Plan", "prepare"]


_NO_USES = Uses(())


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
    facts : callable
        Makes `diff`.
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
    saving : Saving or None
        How often what is done is kept, if that is asked for.
    remote : bool
        Whether a side lies elsewhere.
    uses : Uses
        The kernels that it will call.
    """

    pairs: tuple[TensorPair, ...]
    loads: tuple[Load, ...]
    facts: Callable[[], Diff]
    memory: Memory
    spectra: SpectraPlan | None
    io: str
    device: Device
    options: Options
    want_masks: bool
    grain: Grain = GRAIN
    spectra_gpu: SpectraGpu | None = None
    saving: Saving | None = None
    remote: bool = False
    uses: Uses = _NO_USES

    @cached_property
    def diff(self) -> Diff:
        """Every fact that needs no data; its columns have length zero.

        Of tens of thousands of tensors it takes long to make, and so waits until it is asked for.
        """
        found = self.facts()
        vars(self)["facts"] = lambda: found  # so that what it was made of, both sides' indexes and all, is let go
        return found

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
        if not self.device.decodes:
            return ""
        sources = ((*sources_of(pair.base), *sources_of(pair.tuned)) for pair in self.pairs)
        quantised = sum(any(isinstance(source, Decoded) for source in some) for some in sources)
        if not quantised:
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
    def projected_gpu_memory(self) -> int:
        """Projected GPU memory of the coordinate pass, in bytes; 0 if the processor makes it."""
        return self.threads * self.device.gpu_bytes

    @property
    def max_memory(self) -> int:
        """The bound it was fitted into, in bytes."""
        spectra = self.spectra.max_memory if self.spectra else 0
        return self.options.max_memory or max(DEFAULT_MEMORY, spectra, self.projected_memory)

    @property
    def mostly_small(self) -> bool:
        """Whether there are very many tensors, of 64 Ki coordinates at most on average."""
        return _mostly_small(self.loads, self.grain)

    def remote_parts(self, task: SpanTask) -> list[tuple[Shard, int, int]]:
        """Where the bytes of remote files begin and end that a task reads."""
        if not self.remote:
            return []
        first, stop = (0, sys.maxsize) if task.span is None else (task.span.first * BLOCK, task.span.stop * BLOCK)
        pairs = [self.pairs[index] for index in task.tensors if not self.loads[index].unread]
        return [part for pair in pairs for part in remote_parts(pair, first, min(stop, pair.base.numel))]

    def formats(self, index: int) -> Formats | None:
        """Formats of one pair of floating tensors; None of integer and opaque ones."""
        base, tuned = self.pairs[index].base, self.pairs[index].tuned
        return formats_of(base.dtype, tuned.dtype, self.options.compare) if base.kind is Kind.FLOAT else None

    def measurement(self, index: int, want_mask: bool) -> Measurement:
        """A fresh measurement of one pair, that makes its mask or only counts it: by bits where nothing is read."""
        base, formats, rule = self.pairs[index].base, self.formats(index), self.options.mask
        if formats is None or self.loads[index].unread:
            return BitMeasurement(DTYPES[base.dtype].bits, rule, want_mask)
        return FloatMeasurement(formats, base.numel, rule, want_mask)

    def measured(self, tensors: range, records: Records) -> Measured:
        """What is stored of consecutive pairs, from their rows."""
        unread = np.array([self.loads[index].unread for index in tensors], bool)
        return measured(records, *self.coordinates(tensors), unread, self.options.mask)

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
    grain: Grain | None = None,
    saving: Saving | None = None,
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
        By default that of the device.
    saving : Saving, optional
        If what is done is to be kept until the run file is there.

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
    for path in filter(is_hub_name, (base, tuned)):
        if not may_be_hub(path):
            tell(Note(f"{path} is what lies here, and not the model of that name in the hub"))
    sides = open_pair(base, tuned, options.stream, options.quick)
    if out is not None:
        check_target(out, [(shard.path, shard.device, shard.inode) for side in sides for shard in side.shards])
    pairing = _paired(*sides, options, tell, read_data)
    device = open_device(options)
    remote = any(shard.remote is not None for side in sides for shard in side.shards)
    grain = grain or (FETCHED if remote and device.grain is GRAIN else device.grain)
    want_masks = out is not None and options.mask.kind != "none"
    # Reads into a cached buffer cost less than mapping pages and dropping them again, and report a lost page.
    io = "pread" if options.io == "auto" else options.io
    loads = loads_of(pairing.pairs, options, device, io, grain)
    fetched = most_fetched(pairing.pairs, loads, grain) if remote else 0
    asked = _uses(pairing, loads, options, want_masks, grain)
    device.warm_up(asked, tell)
    if read_data and pairing.orders:
        # Once the kernels that read pieces are there.
        with open_shards("pread") as shards:
            halves = unusual_halves(pairing.pairs, pairing.orders, sampled_likeness(shards))
            pairing = replace(pairing, warnings=(*pairing.warnings, *halves))
    facts = partial(facts_of_run, *sides, pairing, options)
    threads = min(options.threads or default_threads(), device.threads or sys.maxsize)
    # What waits to be kept, and again as much while it is written.
    default, baseline = DEFAULT_MEMORY + device.overhead, resident() + (2 * saving.size if saving else 0)
    memory = fit_memory(
        loads, threads, options.max_memory, default, room_to_grow(baseline), baseline, want_masks, grain, fetched
    )
    spectra = gpu = None
    if options.spectra is not None:
        from ckptdiff.spectra.spectra_gpu import open_spectra_gpu
        from ckptdiff.spectra.stage import plan_spectra

        gpu = open_spectra_gpu(options, options.spectra.mode, tell)
        taken = memory.baseline + memory.results + memory.ahead
        spectra = plan_spectra(pairing.pairs, options, taken, gpu)
    return Plan(
        pairing.pairs, loads, facts, memory, spectra, io, device, options, want_masks, grain, gpu, saving, remote, asked
    )


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


def _mostly_small(loads: Sequence[Load], grain: Grain) -> bool:
    return len(loads) >= grain.many and sum(load.numel for load in loads) <= len(loads) << 16


def _uses(pairing: Pairing, loads: tuple[Load, ...], options: Options, want_masks: bool, grain: Grain) -> Uses:
    alike: set[Formats] = set()
    alone: set[Formats] = set()
    # What shares a load is stored and read alike, and of that a checkpoint has few kinds.
    kinds = {id(load): (one, load) for one, load in zip(pairing.pairs, loads, strict=True)}.values()
    for one, load in kinds:
        if one.base.kind is Kind.FLOAT:
            formats = formats_of(one.base.dtype, one.tuned.dtype, options.compare)
            (alone if load.kind is None else alike).add(formats)
    sides = [side for one, _ in kinds for side in (one.base, one.tuned)]
    decoded = any(isinstance(source, Decoded) for side in sides for source in sources_of(side))
    in_boxes = pairing.orders or not all(map(is_contiguous, sides))
    reading = ["decoded"] if decoded else ["boxes"] if in_boxes else []
    largest = max(map(math.prod, {one.shape for one in pairing.pairs}), default=0)
    mask_chunk = mask_chunk_bytes(largest) if want_masks else 0
    if mask_chunk and _mostly_small(loads, grain):
        mask_chunk = max(mask_chunk, ENCODED)  # the encoder takes their histograms, too
    return uses(alike, alone, mask_chunk, reading)
