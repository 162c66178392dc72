from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
from patience import PATIENCE

from ckptdiff.in_order import Task, in_order


def nothing() -> None:
    """Called, it does nothing."""


class Machine:
    """Counts the slots that are taken."""

    def __init__(self) -> None:
        self.taken = self.most = 0
        self.began: list[int] = []
        self._lock = threading.Lock()

    def work(self, number: int, slots: int, seconds: float) -> int:
        with self._lock:
            self.began.append(number)
            self.taken += slots
            self.most = max(self.most, self.taken)
        time.sleep(seconds)
        with self._lock:
            self.taken -= slots
        return number


def test_fewer_threads_than_slots_take_all_tasks_in_turn() -> None:
    machine = Machine()
    tasks = (Task(partial(machine.work, number, 1, 0.001), 1, 0) for number in range(40))
    assert list(in_order(tasks, 6, nothing, nothing, ahead=1, threads=3)) == list(range(40))
    assert machine.most <= 3


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_results_come_in_order_and_slots_suffice(slots: int) -> None:
    machine, draw = Machine(), random.Random(slots)
    tasks = []
    for number in range(60):
        taken = draw.randint(1, slots)
        tasks.append(Task(partial(machine.work, number, taken, draw.random() / 500), taken, draw.randint(1, 9)))
    stopped = threading.Event()
    assert list(in_order(iter(tasks), slots, stopped.set, nothing)) == list(range(60))
    assert machine.most <= slots
    assert machine.taken == 0
    assert stopped.is_set()


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_no_slot_stays_idle(slots: int) -> None:
    gate = threading.Barrier(slots)  # which nobody passes before all are there
    tasks = [Task(lambda: gate.wait(PATIENCE), 1, 1) for _ in range(slots)]
    assert sorted(in_order(iter(tasks), slots, nothing, nothing)) == list(range(slots))


def test_a_long_task_begins_in_good_time() -> None:
    machine = Machine()
    tasks = [Task(partial(machine.work, number, 1, 0), 1, 100 if number in (5, 29) else 1) for number in range(30)]
    assert list(in_order(iter(tasks), 1, nothing, nothing, ahead=8)) == list(range(30))
    assert machine.began[:2] == [5, 0]
    assert 22 <= machine.began.index(29) < 29  # looked at once 22 results are handed over, then first of all


def test_no_task() -> None:
    empty: Iterator[Task[int]] = iter(())
    assert list(in_order(empty, 2, nothing, nothing)) == []


def test_a_failure_stops_what_runs_and_comes_through() -> None:
    stop = threading.Event()

    def fail() -> int:
        raise ArithmeticError("no")

    def wait() -> int:
        assert stop.wait(PATIENCE)
        return 1

    tasks = [Task(wait, 1, 1), Task(fail, 1, 1)]
    with pytest.raises(ArithmeticError, match="no"):
        list(in_order(iter(tasks), 2, stop.set, nothing))


def test_a_caller_that_gives_up_stops_what_runs() -> None:
    stop = threading.Event()
    results = in_order(
        iter([Task(lambda: 0, 1, 2), Task(lambda: int(stop.wait(PATIENCE)), 1, 1)]), 2, stop.set, nothing
    )
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert stop.is_set()


def test_the_caller_is_called_while_it_waits() -> None:
    called = threading.Event()
    threads = []

    def idle() -> None:
        threads.append(threading.current_thread())
        if len(threads) == 3:
            called.set()

    task = Task(lambda: called.wait(PATIENCE), 1, 1)
    assert list(in_order(iter([task]), 1, nothing, idle, patience=0.001)) == [True]
    assert len(threads) >= 3 and set(threads) == {threading.current_thread()}


def test_what_is_raised_while_it_waits_ends_it() -> None:
    stop = threading.Event()

    def idle() -> None:
        raise LookupError("of the test")

    with pytest.raises(LookupError, match="of the test"):
        list(in_order(iter([Task(lambda: stop.wait(PATIENCE), 1, 1)]), 1, stop.set, idle, patience=0.001))
    assert stop.is_set()
