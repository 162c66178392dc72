"""Run a comparison: plan, stream, compute, merge, write. It emits events and knows no screen."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint.kept import Kept
from ckptdiff.checkpoint.open_shards import OpenShards, open_shards
from ckptdiff.checkpoint.weights import CommonPart
from ckptdiff.errors import OptionError
from ckptdiff.events import Finished, Listener, Note, Stage, Started, TensorsDone, ignore, stage
from ckptdiff.figures.catalogue import COLUMNS
from ckptdiff.figures.columns import Measured
from ckptdiff.figures.result import Diff, KeptFacts
from ckptdiff.figures.spectral import Spectra
from ckptdiff.files.unfinished import Saving, Unfinished
from ckptdiff.options import Options, RayOptions
from ckptdiff.run.kept_results import KeptResults
from ckptdiff.run.planning import Plan, prepare
from ckptdiff.run.schedule import Threads, execute
from ckptdiff.run.tasks import Grain
from ckptdiff.run.worker import MaskChunks, PartialMask, Result
from ckptdiff.runfile.belonging import belonging, resumable
from ckptdiff.runfile.writer import RunFileWriter

if TYPE_CHECKING:
    from ckptdiff.cluster.on_ray import Cluster, ClusterPlan


def run(
    base: str,
    tuned: str,
    *,
    out: Path | None = None,
    options: Options | None = None,
    listener: Listener | None = None,
    title: str | None = None,
    grain: Grain | None = None,
    saving: Saving | None = None,
    on_ray: RayOptions | None = None,
) -> Diff:
    """Compare two checkpoints; ``listener`` is called with every event, in this thread.

    The run file ``out`` appears when it is complete. With `saving`, what is done is kept beside it until then, and
    what an earlier run has kept is not done again. With `on_ray`, a cluster does the tasks. CkptdiffError if the inputs
    are damaged or change, the output cannot be written, memory does not suffice, what was kept belongs to another run,
    or the cluster fails.
    """
    begun, tell = time.perf_counter(), listener or ignore
    if saving is not None and out is None:
        raise OptionError("--resume keeps what is done beside the run file, and there is none", hint="-o RUN.h5")
    if on_ray is None:
        plan = prepare(base, tuned, out=out, options=options, tell=tell, grain=grain, saving=saving)
        return run_plan(plan, out=out, listener=tell, title=title, begun=begun)
    from ckptdiff.cluster.joining import joined_cluster

    with joined_cluster(on_ray, options or Options(), tell) as cluster:
        plan = cluster.prepare(base, tuned, out=out, tell=tell, grain=grain, saving=saving)
        return run_plan(plan, out=out, listener=tell, title=title, begun=begun, cluster=cluster)


def planned(
    base: str, tuned: str, out: Path | None, options: Options, on_ray: RayOptions | None, tell: Listener
) -> tuple[Plan, ClusterPlan | None]:
    """The plan of a run, for which no data is read, and how a cluster would share it; errors as :func:`run` has."""
    if on_ray is None:
        return prepare(base, tuned, out=out, options=options, tell=tell, read_data=False), None
    from ckptdiff.cluster.joining import joined_cluster

    with joined_cluster(on_ray, options, tell) as cluster:
        plan = cluster.prepare(base, tuned, out=out, tell=tell, read_data=False)
        return plan, cluster.spread(plan)


def run_plan(
    plan: Plan,
    *,
    out: Path | None = None,
    listener: Listener | None = None,
    title: str | None = None,
    begun: float | None = None,
    cluster: Cluster | None = None,
) -> Diff:
    """Carry out a plan that `prepare` made for the same `out`; it began at ``begun``, by ``time.perf_counter``."""
    begun, tell = time.perf_counter() if begun is None else begun, listener or ignore
    started = datetime.now(UTC) - timedelta(seconds=time.perf_counter() - begun)
    if cluster is not None:
        _introduce(plan, tell)
        cluster.make_ready(plan, tell)
    with (
        open_shards(plan.io, plan.memory.ahead) as shards,
        _unfinished(plan, out, shards, tell, cluster) as work,
        _run_file(plan, out, title) as writer,
    ):
        kept = None if work is None else KeptResults(work)
        done = kept.nbytes(plan) if kept else 0
        with cluster.hands(plan, shards, kept) if cluster else Threads(plan, shards, kept) as hands:
            found = execute(plan, hands, lambda: told.again(results.nbytes + hands.under_way()), kept)
            if cluster is None:
                # While the first tasks are under way: the facts of tens of thousands of tensors take long to gather.
                _introduce(plan, tell)
            results = _Results(plan, tell)
            with stage(tell, "comparing", plan.total_bytes, "bytes", done) as told:
                _take_all(found, plan, results, told, writer, work)
        shards.check()
        spectra = _spectra(plan, results, shards, writer, tell, work, cluster)
        shards.check()
        seconds = time.perf_counter() - begun
        diff = results.diff({"started": started.isoformat(timespec="seconds"), "seconds": round(seconds, 3)})
        diff = replace(diff, spectra=spectra)
        for warning in diff.warnings[len(plan.diff.warnings) :]:
            tell(Note(warning, warning=True))
        if writer is not None:
            with stage(tell, "writing"):
                writer.finish(diff)
                if work is not None:
                    work.remove()
    tell(Finished(diff, seconds))
    return diff


def _introduce(plan: Plan, tell: Listener) -> None:
    for warning in plan.diff.warnings:
        tell(Note(warning, warning=True))
    why = f" ({plan.device.note})" if plan.device.note else ""
    tell(Note(f"device {plan.device.name}{why}, {plan.threads} threads, io {plan.io} (--io {plan.options.io})"))
    tell(Note(f"projected memory {plan.projected_memory >> 20} MiB of {plan.max_memory >> 20} MiB"))
    for note in filter(None, (plan.threads_note, plan.decoding_note)):
        tell(Note(note))
    tell(Started(plan.tensors, plan.total_bytes, plan.diff))


def _unfinished(
    plan: Plan, out: Path | None, shards: OpenShards, tell: Listener, cluster: Cluster | None
) -> AbstractContextManager[Unfinished | None]:
    """What is done of a run file, if that is kept."""
    if out is None:
        return nullcontext()
    gpu, spectra = plan.spectra_gpu, plan.options.spectra
    away = "a GPU of a node" if cluster is not None and cluster.on_gpu else None
    devices = ", ".join(filter(None, (plan.device.name, gpu.name if gpu else away)))
    return resumable(out, lambda: belonging("diff", plan.diff, devices, spectra), shards, tell, plan.saving)


@contextmanager
def _run_file(plan: Plan, out: Path | None, title: str | None) -> Iterator[RunFileWriter | None]:
    if out is None:
        yield None
        return
    options = plan.options
    with RunFileWriter(out, rule=options.mask, compare=options.compare, title=title, paged=plan.mostly_small) as writer:
        yield writer


def _take_all(
    found: Iterable[Result],
    plan: Plan,
    results: _Results,
    told: Stage,
    writer: RunFileWriter | None,
    work: Unfinished | None,
) -> None:
    """Put what tasks gave where it belongs."""
    partial: dict[int, PartialMask] = {}
    for count, result in enumerate(found):
        if work is not None:
            work.tick()
        if writer is not None:
            if count == plan.memory.tasks_waiting:
                # No thread waits for room for what it measures: all that was done before anyone took it is taken.
                writer.add_facts(plan.diff.tensors)
            _write_masks(writer, plan, result, partial)
        for measured in results.take(result, told):
            if writer is not None:
                writer.add_histograms(measured.histograms)


def _write_masks(writer: RunFileWriter, plan: Plan, result: Result, partial: dict[int, PartialMask]) -> None:
    if not plan.want_masks:
        return
    for found in result.masks:
        pair = plan.pairs[found.tensor]
        if not isinstance(found, MaskChunks):
            assert isinstance(pair.base, CommonPart)
            found = partial.setdefault(found.tensor, PartialMask(found.tensor, pair.base)).take(found)
        if found.chunks:
            writer.add_mask_chunks(pair.name, pair.shape, found.first, found.chunks)
    for index in result.tensors:
        if not plan.loads[index].numel:
            writer.begin_mask(plan.pairs[index].name, plan.pairs[index].shape)


def _spectra(
    plan: Plan,
    results: _Results,
    shards: OpenShards,
    writer: RunFileWriter | None,
    tell: Listener,
    work: Unfinished | None,
    cluster: Cluster | None,
) -> Spectra | None:
    """Measure the spectra of all matrices, once the coordinate pass is through."""
    if plan.options.spectra is None:
        return None
    from ckptdiff.spectra.stage import SpectraTable, measure_spectra

    table = SpectraTable(plan.options.spectra.mode, plan.tensors)
    away = None if cluster is None else cluster.matrices(plan)
    asked = plan.pairs, results.diff({}), shards, plan.options, tell, plan.spectra_gpu, work, away
    for found in measure_spectra(*asked):
        table.take(found)
        if writer is not None and found.method:
            writer.add_spectrum(plan.pairs[found.index].name, found.method, found.lists)
    return table.finish()


class _Results:
    """Columns as they fill, and the events that tell of it in plan order."""

    def __init__(self, plan: Plan, tell: Listener) -> None:
        self._plan, self._tell = plan, tell
        self._columns: dict[str, NDArray[Any]] = {c.name: np.zeros(plan.tensors, c.dtype) for c in COLUMNS}
        self._complete: dict[int, tuple[range, Measured]] = {}
        self._next = 0
        self.nbytes = self._compared = self._unchanged = 0
        self._large: dict[int, list[int]] = {}
        self._facts = list(plan.diff.tensors)
        self._kept: dict[int, Kept] = {}
        self._odd: set[tuple[str, str, str, str]] = set()

    def take(self, result: Result, told: Stage) -> Iterator[Measured]:
        """Note a result; yield the tensors that are complete with all before them."""
        self.nbytes += self._bytes_of(result)
        self._compared += result.compared
        self._unchanged += result.unchanged
        told.at(self.nbytes, self._plan.pairs[result.tensors[0]].name, self._compared, self._unchanged)
        self._odd |= result.odd
        for index, kept in result.kept.items():
            self._kept[index] = self._kept[index] + kept if index in self._kept else kept
        if result.records is not None:
            self._complete[result.tensors.start] = result.tensors, self._plan.measured(result.tensors, result.records)
        while self._next in self._complete:
            tensors, measured = self._complete.pop(self._next)
            for index in tensors:
                if index in self._kept:
                    self._facts[index] = replace(self._facts[index], kept=_kept_facts(self._kept.pop(index)))
            for name, values in measured.columns.items():
                self._columns[name][tensors.start : tensors.stop] = values
            yield measured
            self._next = tensors.stop
            self._tell(TensorsDone(tensors.start, self._part(tensors)))

    def _bytes_of(self, result: Result) -> int:
        """Bytes that count as read: each once, in equal parts where a large tensor is passed over several times."""
        loads, index = self._plan.loads[result.tensors.start : result.tensors.stop], result.tensors[0]
        if result.span is None:
            return sum(load.nbytes for load in loads)
        if index not in self._large:
            self._large[index] = [loads[0].nbytes, self._plan.measurement(index, False).passes]
        left, passes = self._large[index]
        if result.records is not None:
            del self._large[index]
            return left
        counted = min(loads[0].span_bytes(result.span) // passes, left)
        self._large[index][0] -= counted
        return counted

    def _part(self, tensors: range) -> Diff:
        part = slice(tensors.start, tensors.stop)
        columns = {name: values[part] for name, values in self._columns.items()}
        return replace(self._plan.diff, tensors=tuple(self._facts[part]), columns=columns)

    def diff(self, run: dict[str, Any]) -> Diff:
        """The result."""
        ran = {"device": self._plan.device.name, "threads": self._plan.threads, "io": self._plan.io, **run}
        warnings = (*self._plan.diff.warnings, *_odd_scales(self._odd))
        return replace(self._plan.diff, tensors=tuple(self._facts), columns=self._columns, run=ran, warnings=warnings)


def _kept_facts(kept: Kept) -> KeptFacts:
    def share(part: int | None, whole: int | None) -> float | None:
        return part / whole if part is not None and whole else None

    return KeptFacts(
        share(kept.equal_codes, kept.values), share(kept.equal_scales, kept.scales), share(kept.within, kept.changed)
    )


def _odd_scales(odd: set[tuple[str, str, str, str]]) -> list[str]:
    """Say of each tensor with scales that are no positive numbers what they are."""
    kinds: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for path, tensor, what, weight in sorted(odd):
        kinds[path, tensor, weight].append(what)
    return [
        f"{path}: {tensor}: some scales are {' and '.join(whats)}: values of {weight} are what they make of it"
        for (path, tensor, weight), whats in kinds.items()
    ]
