"""What is asked of the threads of a process, in which order, by a run and by a node of a cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.cluster.node_work import _results
from ckptdiff.events import ignore
from ckptdiff.measure.partial import Partial
from ckptdiff.measure.passes import Measurement
from ckptdiff.options import MaskRule, Options
from ckptdiff.run.planning import prepare
from ckptdiff.run.schedule import Threads, execute
from ckptdiff.run.tasks import GRAIN, Load, Span, SpanTask, plan_tasks
from ckptdiff.run.worker import Result

LLAMA = Path(__file__).parents[2] / "fixtures" / "llama"


class Asked:
    """Shards elsewhere that note what is asked for ahead."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []

    def all_ahead(self, parts: Any, first: bool = False) -> list[Any]:
        parts = list(parts)
        self.waiting[:] = parts + self.waiting if first else self.waiting + parts
        return [nullcontext() for _ in parts]


@pytest.mark.parametrize("first", [False, True])
def test_what_is_asked_for_ahead_is_in_order(first: bool) -> None:
    asked = Asked()
    plan: Any = SimpleNamespace(
        memory=SimpleNamespace(tasks_waiting=2), threads=1, remote_parts=lambda task: task.span.first
    )
    tasks = [SpanTask(range(1), Span(0, start, start + 8)) for start in range(0, 800, 8)]
    with Threads(plan, asked) as threads:  # type: ignore[arg-type]
        handed = [task for batch in threads.batches(iter(tasks), first) for task in batch]
    assert handed == tasks
    assert asked.waiting == [task.span.first for task in tasks if task.span is not None]


class Noting:
    """Hands that note what is begun, and are done with it at once."""

    def __init__(self, at_once: int) -> None:
        self.at_once, self.spare, self.begun = at_once, deque[Partial](), list[SpanTask]()

    def batches(self, tasks: Iterable[SpanTask], first: bool = False) -> Iterator[Sequence[SpanTask]]:
        return ([task] for task in tasks)

    def begin(self, batch: Sequence[SpanTask], passes: Mapping[int, Measurement]) -> Any:
        self.begun += batch
        given = [Result(task.tensors) for task in batch]
        return SimpleNamespace(wait=lambda seconds: True, results=lambda: given)


def test_the_first_tasks_are_begun_before_a_result_is_asked_for() -> None:
    loads = (Load(16, (16, 16)),) * 2000
    plan: Any = SimpleNamespace(loads=loads, grain=GRAIN)
    tasks, hands = list(plan_tasks(loads)), Noting(3)
    found: Any = execute(plan, hands, lambda: None)  # type: ignore[arg-type]
    assert hands.begun == tasks[:3] and len(tasks) > 4
    assert next(found).tensors == tasks[0].tensors and len(hands.begun) == 3
    assert next(found).tensors == tasks[1].tensors and len(hands.begun) == 4
    assert [result.tensors for result in found] == [task.tensors for task in tasks[2:]] and hands.begun == tasks


def test_a_node_gives_what_its_tasks_ask_for() -> None:
    """Without a cluster: a batch of small tensors, as it is handed to a node."""
    options = Options(mask=MaskRule.parse("none"), threads=2)
    plan = prepare(str(LLAMA / "base"), str(LLAMA / "tuned"), out=None, options=options, tell=ignore)
    batch = list(plan_tasks(plan.loads, plan.grain))
    with open_shards(options.io) as shards, Threads(plan, shards) as threads:
        found = list(_results(plan, batch, {}, threads))
    assert [one.tensors for one in found] == [task.tensors for task in batch]
    assert sum(one.compared for one in found) == sum(pair.base.numel for pair in plan.pairs)
