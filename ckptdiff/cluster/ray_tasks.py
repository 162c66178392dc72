"""Hand out what a run asks for as tasks of Ray, no more at a time than is of use, and take their results in."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptdiff.cluster.node_work import measure_matrices, measure_tasks
from ckptdiff.files.packed_entry import unpack
from ckptdiff.linalg.work import WorkMeter
from ckptdiff.measure.partial import Partial
from ckptdiff.measure.passes import Measurement
from ckptdiff.options import Options
from ckptdiff.run.kept_results import KeptResults, result_of
from ckptdiff.run.planning import Plan
from ckptdiff.run.tasks import SpanTask, batched
from ckptdiff.run.worker import Result, blank
from ckptdiff.spectra.job import JobGroup, Measuring
from ckptdiff.spectra.measure import MatrixSpectra
from ckptdiff.spectra.spectra_gpu import HOST_ROOM

if TYPE_CHECKING:
    from ckptdiff.cluster.on_ray import Cluster

__all__ = ["RayHands", "RayMatrices"]

_MATRICES = 1 << 24
"""Entries of matrices that make a task: a second or more of work."""


class UnderWay:
    """Numbers of tasks, and what the tally knows of those that are under way; it is asked while others are waited for.

    A tally that was lost with its node says nothing until it is there again.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.tasks: dict[int, Any] = {}
        self._asked: Any = None
        self._known = 0.0

    def done(self) -> float:
        """What is done of all, a moment ago."""
        ray = self._cluster.ray
        if self._asked is not None and self._cluster.there([self._asked], 0):
            try:
                self._known = ray.get(self._asked)
            except ray.exceptions.RayActorError:
                self._known = 0.0
            self._asked = None
        if self._asked is None:
            self._asked = self._cluster.tally.of.remote(list(self.tasks))
        return self._known

    def cancel(self) -> None:
        """Give up all. Without a head Ray would crash; it ends the tasks of a process that has ended in any case."""
        if self.tasks and self._cluster.has_head():
            for reference in self.tasks.values():
                self._cluster.ray.cancel(reference, force=True)
        self.tasks.clear()


class RayHands:
    """Does tasks of the coordinate pass on a cluster."""

    def __init__(self, cluster: Cluster, plan: Plan, sent: Any, kept: KeptResults | None) -> None:
        spread = cluster.spread(plan)
        self.cluster, self.plan, self.kept, self._sent = cluster, plan, kept, sent
        self.room = spread.task_threads, spread.task_memory
        self._most = spread.task_bytes
        self.at_once, self.spare = cluster.at_once(*self.room), deque[Partial]()
        self.underway = UnderWay(cluster)
        self._function = cluster.task(measure_tasks, *self.room)

    def __enter__(self) -> RayHands:
        return self

    def __exit__(self, *raised: object) -> None:
        self.underway.cancel()

    def batches(self, tasks: Iterable[SpanTask], first: bool = False) -> Iterator[Sequence[SpanTask]]:
        """As many as make the bytes of a task."""
        return batched(tasks, self.plan.loads, self._most)

    def begin(self, batch: Sequence[SpanTask], passes: Mapping[int, Measurement]) -> _Away:
        """Give tasks to Ray."""
        turns = [0 if task.span is None else passes[task.span.tensor].turn for task in batch]
        further = [task.span.tensor for task, turn in zip(batch, turns, strict=True) if turn and task.span is not None]
        sent = {tensor: passes[tensor].without_results() for tensor in further}
        number = next(self.cluster.numbers)
        with self.cluster.told("handing out tasks"):
            reference = self._function.remote([self._sent], batch, sent, number, self.cluster.tally)
        self.underway.tasks[number] = reference
        return _Away(self, number, list(zip(batch, turns, strict=True)))

    def under_way(self) -> int:
        """Bytes, by the word of the nodes."""
        return int(self.underway.done())


class _Away:
    """Tasks that Ray has."""

    def __init__(self, hands: RayHands, number: int, batch: list[tuple[SpanTask, int]]) -> None:
        self._hands, self._number, self._batch = hands, number, batch

    def wait(self, seconds: float) -> bool:
        hands = self._hands
        if hands.cluster.there([hands.underway.tasks[self._number]], seconds):
            return True
        hands.cluster.require_room(*hands.room)
        return False

    def results(self) -> Iterator[Result]:
        hands = self._hands
        name = hands.plan.pairs[self._batch[0][0].tensors.start].name
        what = f"comparing {name} and what follows it"
        packed = hands.cluster.get(hands.underway.tasks.pop(self._number), what, self._number)
        packed.reverse()
        for task, turn in self._batch:
            data = packed.pop()
            if hands.kept is not None:
                hands.kept.keep_packed(task, turn, [data])
            yield result_of(unpack(data), task, lambda: blank(hands.spare))


class RayMatrices:
    """Measures matrices on a cluster."""

    batch = _MATRICES

    def __init__(self, cluster: Cluster, plan: Plan, sent: Any, options: Options) -> None:
        self._cluster, self._sent = cluster, sent
        self._taken = plan.memory.baseline + plan.memory.ahead
        self.budget, self.alone = cluster.budget(self._taken), not cluster.on_gpu

    def measured(
        self, groups: Iterator[JobGroup], measuring: Measuring, meter: WorkMeter, idle: Callable[[float], None]
    ) -> Iterator[list[tuple[int, MatrixSpectra]]]:
        """Yield the matrices of each group as they come."""
        cluster, underway = self._cluster, UnderWay(self._cluster)
        gpus, begun = int(not self.alone), dict[Any, tuple[int, JobGroup, tuple[int, int, int]]]()
        group = next(groups, None)
        try:
            while group is not None or begun:
                while group is not None:
                    room = group.slots, self._memory(group), gpus
                    if len(begun) >= cluster.at_once(*room):
                        break
                    number, function = next(cluster.numbers), cluster.task(measure_matrices, *room)
                    with cluster.told("handing out matrices"):
                        reference = function.remote([self._sent], group, self.budget, number, cluster.tally)
                    underway.tasks[number] = reference
                    begun[reference] = number, group, room
                    group = next(groups, None)
                for reference in cluster.there(begun):
                    number, measured, _ = begun.pop(reference)
                    del underway.tasks[number]
                    found = cluster.get(reference, f"spectra of {measured.jobs[0].pair.name}", number)
                    meter.took(sum(map(measuring.work, measured.jobs)))
                    if measuring.keep is not None:
                        for job, (_, spectra) in zip(measured.jobs, found, strict=True):
                            measuring.keep(job, spectra)
                    yield found
                idle(underway.done())
                for _, _, room in itertools.islice(begun.values(), 1):
                    cluster.require_room(*room)
        finally:
            underway.cancel()

    def _memory(self, group: JobGroup) -> int:
        if not self.alone:
            return self._taken + HOST_ROOM
        return self._taken + max(self.budget.takes(job.view) for job in group.jobs)
