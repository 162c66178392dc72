"""Do tasks in a process of a node: the plan comes once, with it the tasks, and their results go back packed."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ckptdiff.checkpoint import Shard
from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.cluster.tally import seldom
from ckptdiff.errors import ChangedFileError, CheckpointError, CkptdiffError, ClusterError
from ckptdiff.events import ignore
from ckptdiff.in_order import Task, in_order
from ckptdiff.linalg.work import WorkMeter
from ckptdiff.measure.passes import Measurement
from ckptdiff.options import Options
from ckptdiff.remote.address import without_secrets
from ckptdiff.run.devices import open_device
from ckptdiff.run.kept_results import packed_result
from ckptdiff.run.planning import Plan
from ckptdiff.run.schedule import Begun, Threads, in_order_begun, results_of
from ckptdiff.run.tasks import SpanTask, cut
from ckptdiff.run.warm_up import load
from ckptdiff.run.worker import Result, joined
from ckptdiff.spectra.budget import Budget
from ckptdiff.spectra.job import JobGroup, Measuring
from ckptdiff.spectra.measure import MatrixSpectra
from ckptdiff.spectra.stage import spectra_uses

__all__ = ["Failure", "Sent", "make_ready", "measure_matrices", "measure_tasks"]

_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class Sent:
    """What every node needs of a run.

    Attributes
    ----------
    plan : Plan
        Without its facts and its device, which each process opens for itself.
    folder : str
        The working directory of the one who planned, in which relative paths begin.
    on_gpu : Options or None
        What to open a GPU for spectra with, if they are measured on one.
    environment : dict of str to str
        Variables that its processes get. They come with the plan, and not as a runtime environment of Ray's, which its
        dashboard and logs show.
    """

    plan: Any
    folder: str
    on_gpu: Options | None = None
    environment: dict[str, str] = field(default_factory=dict, repr=False)

    def found_here(self, shard: Shard) -> Shard:
        """A local shard as this node has it.

        Device and inode are the node's own. CheckpointError if the node does not see it, ChangedFileError if it is
        not the file that was planned with.
        """
        path = os.path.join(self.folder, shard.path)  # noqa: PTH118  a Path would change what a user wrote
        try:
            status = Path(path).stat()
        except OSError as error:
            raise CheckpointError(
                f"cannot be seen there: {error.strerror}",
                file=path,
                expected="every node to see every file of both checkpoints, under the same path",
                hint="put them on a file system that all nodes have mounted, or in an object store",
            ) from error
        if (status.st_size, status.st_mtime_ns) != (shard.size, shard.mtime_ns):
            raise ChangedFileError(
                "not the file that the run was planned with",
                file=path,
                expected=f"{shard.size} bytes, modified at {shard.mtime_ns} ns",
                found=f"{status.st_size} bytes, modified at {status.st_mtime_ns} ns",
                hint="the same files on every node, which nothing writes to",
            )
        return replace(shard, path=path, device=status.st_dev, inode=status.st_ino)

    def shards(self) -> Any:
        """Readers of the shards of this node."""
        return open_shards(self.plan.io, self.plan.memory.ahead, self.found_here)


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of ours, as what a task gives: it is told as it is, and nothing is tried again."""

    error: CkptdiffError
    node: str
    """The node's ID."""


_held: dict[str, Sent] = {}
"""By the ID of the object: the last run that this process works for."""
_gpus: dict[Options, Any] = {}


def make_ready(where: Sequence[Any], shards: Sequence[Shard]) -> Failure | None:
    """Look whether this node sees all shards, and have the kernels compiled here."""

    def work() -> None:
        sent = _sent(where)
        for shard in shards:
            sent.found_here(shard)
        if sent.plan.options.spectra is not None:
            load(None, spectra_uses(sent.plan.pairs, sent.plan.options.compare), ignore)

    return _told(work)


def measure_tasks(
    where: Sequence[Any], batch: Sequence[SpanTask], passes: Mapping[int, Measurement], number: int, tally: Any
) -> list[bytes] | Failure:
    """Do tasks on the threads of this process, and give what each gave, packed.

    Parameters
    ----------
    where : sequence
        The reference of a :class:`Sent`, in a list, so that Ray does not unpack it for each task anew.
    batch : sequence of SpanTask
        Of any size; they are cut as the threads of a process want them.
    passes : mapping of int to Measurement
        Of large tensors that are past their first pass.
    number : int
        Of this batch, under which the tally is told where it is, and how many bytes are measured.
    tally : actor
    """

    def work() -> list[bytes]:
        tell, done = _teller(number, tally), 0.0
        sent = _sent(where)
        plan = sent.plan
        known = dict(passes)
        for task in batch:
            if task.span is not None and task.span.tensor not in known:
                known[task.span.tensor] = plan.measurement(task.span.tensor, plan.want_masks)
        packed: list[bytes] = []
        with sent.shards() as shards, Threads(plan, shards) as threads:
            whole: Result | None = None
            for result in _results(plan, batch, known, threads):
                task = SpanTask(result.tensors, result.span)
                done += task.nbytes(plan.loads) / _times(known, task)
                tell(done)
                whole = result if whole is None else joined(whole, result, threads.spare)
                if whole.span is None or whole.span == batch[len(packed)].span:
                    packed.append(b"".join(packed_result(whole)))
                    whole = None
        return packed

    return _told(work)


def measure_matrices(
    where: Sequence[Any], group: JobGroup, budget: Budget, number: int, tally: Any
) -> list[tuple[int, MatrixSpectra]] | Failure:
    """Measure matrices, on the GPU of this task if there is to be one; the tally is told of their work."""

    def work() -> list[tuple[int, MatrixSpectra]]:
        from ckptdiff.linalg.threads import one_blas_thread

        tell = _teller(number, tally)
        sent = _sent(where)
        gpu = None if sent.on_gpu is None else _gpu(sent.on_gpu)
        with sent.shards() as shards, one_blas_thread():
            own = budget if gpu is None else gpu.budget(sent.on_gpu)
            measuring = Measuring(shards, sent.plan.options.compare, own, gpu)
            total = sum(map(measuring.work, group.jobs))
            meter = WorkMeter(total)
            task = Task(lambda: measuring.measure(group, meter), 1, 1)
            found = in_order(iter([task]), 1, measuring.stop.set, lambda: tell(meter.share() * total))
            return [one for some in found for one in some]

    return _told(work)


def _results(
    plan: Plan, batch: Sequence[SpanTask], passes: Mapping[int, Measurement], threads: Threads
) -> Iterator[Result]:
    pieces = (piece for task in batch for piece in ([task] if task.span is None else cut(task.span, plan.grain)))
    batches = threads.batches(pieces)

    def begin() -> Begun | None:
        some = next(batches, None)
        return None if some is None else threads.begin(some, passes)

    for begun in in_order_begun(begin, threads.at_once):
        yield from results_of(begun, lambda: None)


def _times(passes: Mapping[int, Measurement], task: SpanTask) -> int:
    """How often a task is likely to be passed over."""
    return 1 if task.span is None else passes[task.span.tensor].passes


def _teller(number: int, tally: Any) -> Callable[[float], None]:
    """Have the tally know where a task is, and how far."""
    import ray

    node = ray.get_runtime_context().get_node_id()

    def tell(done: float) -> None:
        tally.tell.remote(number, done, node)

    tell(0.0)
    return seldom(tell)


def _told(work: Callable[[], _Found]) -> _Found | Failure:
    import ray

    try:
        return work()
    except CkptdiffError as error:
        known = error
    except MemoryError:
        known = ClusterError("out of memory", hint="a lower --max-memory, or fewer --threads")
    except Exception as error:
        # Not left to Ray, whose dashboard and logs would show its text, of which a URL may be part.
        place = traceback.extract_tb(error.__traceback__)[-1]
        found = without_secrets(f"{type(error).__name__}: {error}, in {place.name}, {place.filename}:{place.lineno}")
        known = ClusterError("a task failed for a reason that was not foreseen", found=found, hint="report it")
    return Failure(known, ray.get_runtime_context().get_node_id())


def _sent(where: Sequence[Any]) -> Sent:
    """What was sent of the run, unpacked once in a process, with its device and its kernels."""
    import ray

    (reference,) = where
    name = reference.hex()
    if name not in _held:
        sent: Sent = ray.get(reference)
        os.environ.update(sent.environment)
        device = open_device(sent.plan.options)
        device.warm_up(sent.plan.uses, ignore)
        _held.clear()
        _held[name] = replace(sent, plan=replace(sent.plan, device=device))
    return _held[name]


def _gpu(options: Options) -> Any:
    from ckptdiff.spectra.spectra_gpu import open_spectra_gpu

    if options not in _gpus:
        assert options.spectra is not None
        _gpus[options] = open_spectra_gpu(options, options.spectra.mode, ignore)
    return _gpus[options]
