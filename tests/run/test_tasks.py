"""The plan: every block once and in order, and memory that fits its bound or is refused."""

from __future__ import annotations

import builtins
import os

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from ckptdiff.errors import PlanError
from ckptdiff.run.tasks import GRAIN, Load, Span, SpanTask, batched, cut, fit_memory, plan_tasks

BLOCK = 2**20
MIB = 2**20

numels = st.one_of(
    st.integers(0, 300),
    st.integers(0, 3 * BLOCK),
    st.builds(lambda blocks, odd: blocks * BLOCK + odd, st.integers(1, 40), st.integers(-1, 1)),
)
bits = st.sampled_from([(16, 16), (32, 16), (8, 8), (4, 4), (64, 64), (16,)])


def load(numel: int, widths: tuple[int, ...] = (16, 16), scratch: int = 0, kind: str | None = None) -> Load:
    even = numel + numel % 2 if 4 in widths else numel  # half a byte is refused with the header
    return Load(even, widths, scratch, kind)


loads = st.lists(
    st.builds(load, numels, bits, st.sampled_from([0, 1000, 14 << 20]), st.sampled_from([None, "a", "b"])), max_size=150
)


def spans_of(task: SpanTask, loads: list[Load]) -> list[Span]:
    return [Span(index, 0, loads[index].blocks) for index in task.tensors] if task.span is None else [task.span]


@given(loads)
@example([])
@example([load(0)] * 150)
@example([load(BLOCK), load(BLOCK + 1), load(1)])
def test_every_block_is_covered_once_and_in_order(given_loads: list[Load]) -> None:
    spans = [span for task in plan_tasks(given_loads) for span in spans_of(task, given_loads)]
    covered = [(span.tensor, block) for span in spans for block in blocks_of(span)]
    assert covered == [(i, block) for i, one in enumerate(given_loads) for block in range(-(-one.numel // BLOCK))]


@given(loads)
def test_every_tensor_has_a_span_and_only_its_last_is_short(given_loads: list[Load]) -> None:
    spans = [span for task in plan_tasks(given_loads) for span in spans_of(task, given_loads)]
    assert list(dict.fromkeys(span.tensor for span in spans)) == list(range(len(given_loads)))
    for index, one in enumerate(given_loads):
        mine = [span for span in spans if span.tensor == index]
        assert mine[0].first == 0 and mine[-1].stop == -(-one.numel // BLOCK)
        assert [span.first for span in mine[1:]] == [span.stop for span in mine[:-1]]
        assert sum(one.span_bytes(span) for span in mine) == one.nbytes
        assert one.nbytes == sum(one.numel * width // 8 for width in one.bits)


@given(loads)
def test_tasks_are_small(given_loads: list[Load]) -> None:
    for task in plan_tasks(given_loads):
        tensors = [given_loads[index] for index in task.tensors]
        if task.span is None:
            assert all(one.numel <= BLOCK for one in tensors) and len(tensors) <= GRAIN.tensors
            assert sum(one.numel for one in tensors[:-1]) < GRAIN.numel
            assert len({one.kind for one in tensors}) == 1 and task.alike == (tensors[0].kind is not None)
        else:
            (one,), span = tensors, task.span
            assert span.tensor == task.tensors.start and not task.alike
            assert one.numel > BLOCK and 1 <= span.stop - span.first <= GRAIN.blocks


@given(st.integers(BLOCK + 1, 60 * BLOCK), st.integers(0, 9))
def test_a_further_pass_is_cut_as_the_first(numel: int, index: int) -> None:
    first = [task for task in plan_tasks([load(1)] * index + [load(numel)]) if task.span is not None]
    assert list(cut(Span(index, 0, load(numel).blocks))) == first


@given(st.integers(2, 60), st.lists(st.tuples(st.integers(0, 59), st.integers(1, 9)), max_size=6))
def test_what_is_known_is_a_task_and_what_lies_between_is_cut(blocks: int, wanted: list[tuple[int, int]]) -> None:
    known: list[tuple[int, int]] = []
    for first, length in sorted(wanted):
        if first + length <= blocks and (not known or known[-1][1] <= first):
            known.append((first, first + length))
    tasks = list(plan_tasks([load(3), load(blocks * BLOCK)], GRAIN, lambda index: known if index == 1 else ()))
    spans = [task.span for task in tasks if task.span is not None]
    assert [block for span in spans for block in range(span.first, span.stop)] == list(range(blocks))
    assert set(known) <= {(span.first, span.stop) for span in spans}
    others = [span for span in spans if (span.first, span.stop) not in known]
    assert all(span.stop - span.first <= GRAIN.blocks for span in others)


@given(loads, st.integers(1, 1 << 27))
def test_tasks_that_go_together_are_all_and_as_large_as_asked(given_loads: list[Load], most: int) -> None:
    tasks = list(plan_tasks(given_loads))
    batches = list(batched(tasks, given_loads, most))
    spans = [span for batch in batches for task in batch for span in spans_of(task, given_loads)]
    known = [span for task in tasks for span in spans_of(task, given_loads)]
    assert [(span.tensor, block) for span in spans for block in range(span.first, span.stop)] == [
        (span.tensor, block) for span in known for block in range(span.first, span.stop)
    ]
    largest = max((task.nbytes(given_loads) for task in tasks), default=0)
    sizes = [sum(task.nbytes(given_loads) for task in batch) for batch in batches]
    assert all(most <= size < most + largest for size in sizes[:-1]) and all(batches)
    assert sum(task.numel(given_loads) for batch in batches for task in batch) == sum(one.numel for one in given_loads)


def test_ten_thousands_of_small_tensors_are_few_tasks() -> None:
    assert len(list(plan_tasks([load(16)] * 30_000))) == -(-30_000 // GRAIN.tensors)
    assert len(list(plan_tasks([load(BLOCK)] * 100))) == -(-100 * BLOCK // GRAIN.numel)


def test_a_plan_is_made_as_it_is_asked_for() -> None:
    """A checkpoint of 10**12 coordinates must not fill memory with tasks."""
    tasks = plan_tasks([load(10**18)])
    assert next(tasks).span == Span(0, 0, GRAIN.blocks)
    assert next(tasks).span == Span(0, GRAIN.blocks, 2 * GRAIN.blocks)


@given(loads, st.integers(1, 64), st.integers(1, 4000), st.integers(0, 400), st.booleans())
def test_a_bound_is_honoured_or_refused(
    given_loads: list[Load], threads: int, bound: int, baseline: int, masks: bool
) -> None:
    least = fit_memory(given_loads, 1, 0, 1, 0, baseline * MIB, masks)
    if bound * MIB < least.projected:
        with pytest.raises(PlanError):
            fit_memory(given_loads, threads, bound * MIB, 400 * MIB, 0, baseline * MIB, masks)
        return
    memory = fit_memory(given_loads, threads, bound * MIB, 400 * MIB, 0, baseline * MIB, masks)
    assert memory.projected <= bound * MIB
    assert 1 <= memory.threads <= threads
    assert memory.tasks_waiting >= memory.threads + 1 and memory.baseline == baseline * MIB
    needed = memory.baseline + memory.threads * memory.per_thread + memory.results
    assert memory.projected == needed + memory.tasks_waiting * memory.waiting


@given(loads, st.integers(1, 32), st.integers(150, 3000), st.integers(1, 60))
def test_what_is_fetched_is_within_the_bound(given_loads: list[Load], threads: int, bound: int, fetched: int) -> None:
    local = fit_memory(given_loads, 1, 0, 1, 0, 50 * MIB, True)
    least = fit_memory(given_loads, 1, 0, 1, 0, 50 * MIB, True, fetched=fetched * MIB)
    assert least.projected == local.projected + fetched * MIB and least.ahead == 0
    if bound * MIB < least.projected:
        return
    memory = fit_memory(given_loads, threads, bound * MIB, 1, 0, 50 * MIB, True, fetched=fetched * MIB)
    needed = memory.baseline + memory.threads * memory.per_thread + memory.tasks_waiting * memory.waiting
    assert needed + memory.results + memory.ahead == memory.projected <= bound * MIB
    usual = memory.threads * fetched * MIB
    assert memory.ahead in (0, usual, max(2 * usual, 256 * MIB))


@given(loads, st.integers(1, 32), st.booleans())
def test_no_thread_is_left_out_that_fits(given_loads: list[Load], threads: int, masks: bool) -> None:
    memory = fit_memory(given_loads, threads, 400 * MIB, 400 * MIB, 0, 100 * MIB, masks)
    count = memory.threads + 1
    one_more = memory.baseline + count * memory.per_thread + (count + 1) * memory.waiting + memory.results
    assert memory.threads == threads or one_more > 400 * MIB
    assert memory.of(count) == one_more


@given(loads, st.integers(1, 8), st.integers(1, 300))
def test_a_larger_bound_never_gives_less(given_loads: list[Load], threads: int, extra: int) -> None:
    least = fit_memory(given_loads, 1, 0, 1, 0, 50 * MIB, True).projected
    small, large = (fit_memory(given_loads, threads, least + more * MIB, 1, 0, 50 * MIB, True) for more in (0, extra))
    assert (small.threads, small.tasks_waiting) <= (large.threads, large.tasks_waiting)


@given(loads, st.integers(1, 8), st.integers(0, 2000))
def test_without_a_bound_the_least_that_works_is_allowed(given_loads: list[Load], threads: int, baseline: int) -> None:
    memory = fit_memory(given_loads, threads, 0, 400 * MIB, 0, baseline * MIB, True)
    assert memory.projected <= 400 * MIB or memory.threads == 1
    if memory.threads == threads == 1 and memory.projected > 400 * MIB:
        with pytest.raises(PlanError):
            fit_memory(given_loads, threads, 400 * MIB, 400 * MIB, 0, baseline * MIB, True)


@given(loads, st.integers(1, 256), st.integers(0, 100_000), st.integers(0, 10_000), st.booleans())
def test_the_default_bound_grows_to_what_all_threads_need(
    given_loads: list[Load], threads: int, baseline: int, growth: int, masks: bool
) -> None:
    """Also above a baseline of any size: a library user may hold a model in memory."""
    memory = fit_memory(given_loads, threads, 0, 400 * MIB, 1 << 60, baseline * MIB, masks)
    assert memory.threads == threads and threads + 1 <= memory.tasks_waiting <= 2 * threads + 8
    bounded = fit_memory(given_loads, threads, 0, 400 * MIB, growth * MIB, baseline * MIB, masks)
    assert bounded.threads == 1 or bounded.projected <= max(400, baseline + growth) * MIB
    assert bounded.threads == threads or bounded.of(bounded.threads + 1) > max(400, baseline + growth) * MIB


@given(loads, st.integers(1, 8))
def test_what_an_error_hints_at_works(given_loads: list[Load], threads: int) -> None:
    with pytest.raises(PlanError) as caught:
        fit_memory(given_loads, threads, MIB, 400 * MIB, 0, 100 * MIB, True)
    error = caught.value
    assert error.found == "1 MiB" and error.hint is not None and error.hint.startswith("--max-memory ")
    hinted = int(error.hint.removeprefix("--max-memory ").removesuffix("M"))
    needed = fit_memory(given_loads, 1, 0, 1, 0, 100 * MIB, True).projected
    assert str(error.expected) == f"at least {-(-needed // MIB)} MiB"
    assert hinted % 10 == 0 and needed + 10 * MIB <= hinted * MIB < needed + 20 * MIB
    assert fit_memory(given_loads, threads, hinted * MIB, 400 * MIB, 0, 100 * MIB, True).projected <= hinted * MIB


@given(loads, st.booleans())
def test_larger_pieces_and_work_space_are_counted(given_loads: list[Load], masks: bool) -> None:
    assume(given_loads)
    memory = fit_memory(given_loads, 1, 0, 400 * MIB, 0, 0, masks)
    pieces = [sum(min(one.numel, 2**18) * width // 8 for width in one.bits) for one in given_loads]
    assert memory.per_thread >= max(pieces) + max(one.scratch for one in given_loads)
    assert memory.waiting >= 8 * 6 * 2**15 + (GRAIN.blocks * BLOCK // 8 if masks else 0)


def test_planning_opens_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError(f"a file was opened: {arguments}")

    for module, name in ((builtins, "open"), (os, "open"), (os, "stat"), (os, "lstat")):
        monkeypatch.setattr(module, name, refuse)
    assert len(list(plan_tasks([load((GRAIN.blocks + 1) * BLOCK), load(3)]))) == 3
    assert fit_memory([load(9 * BLOCK)], 4, 0, 400 * MIB, 0, 0, True).threads == 4


def blocks_of(span: Span) -> range:
    return range(span.first, span.stop)
