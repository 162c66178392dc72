"""Work is counted as it was foreseen, by whichever thread does it, and its share never falls."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from told_stages import told_stages

import ckptdiff
from ckptdiff.events import Event, Stage
from ckptdiff.in_order import in_order
from ckptdiff.linalg import work as work_module
from ckptdiff.linalg.on_numpy import NUMPY
from ckptdiff.linalg.stages import ArrayPanels, meanwhile, run_together
from ckptdiff.linalg.survey import survey
from ckptdiff.linalg.threads import count_work, counted, in_parts, one_blas_thread, product_threads, work_counted_in
from ckptdiff.linalg.work import WorkMeter, eigenvalues_work
from ckptdiff.lora.factors import factor_work, factorize
from ckptdiff.memory import resident
from ckptdiff.options import SpectraOptions
from ckptdiff.spectra.matrices import MatrixView
from ckptdiff.spectra.measure import exact_work, measure_exact, measure_randomized, randomized_work


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(work_module, "time", clock)
    return clock


def pair(long: int, short: int, dtype: Any) -> ArrayPanels:
    """A base with gaps in its spectrum, and an update of a flat one."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((long, short)) * np.linspace(1, 3, short)
    return ArrayPanels(base.astype(dtype), (1e-3 * rng.standard_normal((long, short))).astype(dtype), 200)


SMALL = SpectraOptions(block=8, steps=16)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("mode", "short"), [("randomized", 90), ("randomized", 300), ("exact", 90), ("exact", 300)])
def test_what_is_counted_is_what_was_foreseen(mode: str, short: int, threads: int) -> None:
    long = (
        5000 if (mode, short) == ("randomized", 300) else 700
    )  # so many scores that no cut zooms, or so few that all do
    source = pair(long, short, np.float64 if mode == "exact" else np.float32)
    view = MatrixView(0, long, short)
    expected, passes = exact_work(view, True) if mode == "exact" else randomized_work(view, SMALL, 4)
    read = Passes(source)
    meter = WorkMeter(expected)
    with (
        one_blas_thread(),
        product_threads(threads),
        meter.matrix("w", expected, threads) as work,
        work_counted_in(work),
    ):
        (known,) = run_together(read, survey())
        if mode == "exact":
            measure_exact(read, known, view, True, True)
        else:
            measure_randomized(read, known, view, True, SMALL)
    assert work.done == pytest.approx(expected, rel=0.01)
    assert read.count == passes
    assert meter.share() == 1.0


@pytest.mark.parametrize("short", [100, 700])
def test_the_work_of_factors(short: int) -> None:
    long, rank = 800, 60
    source = Passes(pair(long, short, np.float32))
    expected, passes = factor_work(long, short, 4, rank)
    meter = WorkMeter(expected)
    with one_blas_thread(), meter.matrix("w", expected) as work, work_counted_in(work):
        factorize(source, 1e-3 * (long * short) ** 0.5, rank, None, 0)
    assert work.done == pytest.approx(expected, rel=0.01)
    assert source.count == passes


class Passes:
    """Counts the passes over a pair."""

    def __init__(self, source: ArrayPanels) -> None:
        self._source, self.count = source, 0
        self.long, self.short, self.dtype = source.long, source.short, source.dtype
        self.library, self.kept, self.stack = source.library, source.kept, source.stack

    def panels(self) -> Any:
        self.count += 1
        return self._source.panels()

    def sample(self, count: int) -> Any:
        return self._source.sample(count)


def test_a_matrix_that_takes_less_or_more_ends_with_what_it_took() -> None:
    meter = WorkMeter(300.0)
    with meter.matrix("a", 100.0) as work:
        work.add(40.0)
        assert meter.share() == pytest.approx(40 / 300)
    assert meter.share() == pytest.approx(40 / 240)
    with meter.matrix("b", 100.0) as work:
        work.add(150.0)
        assert meter.share() == pytest.approx(140 / 240)  # it may not be more than was foreseen while it lasts
    assert meter.share() == pytest.approx(190 / 290)
    with meter.matrix("c", 100.0) as work:
        assert meter.at_hand() == "c"
        work.add(100.0)
        assert meter.share() == 1.0
    assert (meter.share(), meter.at_hand()) == (1.0, "")
    assert WorkMeter(0.0).share() == 0.0


def test_the_share_never_falls() -> None:
    meter = WorkMeter(200.0)
    with meter.matrix("a", 100.0) as work:
        work.add(100.0)
        before = meter.share()
        work.add(300.0)
    with meter.matrix("b", 100.0):
        assert meter.share() >= before


def test_a_silent_routine_is_taken_to_be_as_fast_as_the_last(clock: Clock) -> None:
    meter = WorkMeter(3000.0)

    def share_of_routine(seconds: float) -> float:
        clock.now += seconds
        return 3000 * meter.share() - before

    with meter.matrix("a", 3000.0, threads=2) as work:
        clock.now += 1.0
        work.add(20.0)
        before = 20.0
        with work.within(1000.0):  # nothing of the kind has ended: 10 a second and thread
            assert share_of_routine(10.0) == pytest.approx(100.0)
            assert share_of_routine(0.0) == pytest.approx(100.0)
            assert share_of_routine(70.0) == pytest.approx(800.0)
            assert 800.0 < share_of_routine(20.0) < 1000.0
            assert 950.0 < share_of_routine(900.0) < 1000.1
        before = 1020.0
        with work.within(1000.0):  # now it is known to be one a second
            assert share_of_routine(100.0) == pytest.approx(100.0)


def test_threads_lose_no_count() -> None:
    meter = WorkMeter(1.0)
    with meter.matrix("a", 1.0) as work:
        threads = [threading.Thread(target=lambda: [work.add(1.0) for _ in range(20_000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert work.done == 80_000.0


@pytest.mark.parametrize("threads", [1, 3])
def test_where_work_is_counted(threads: int) -> None:
    """Parts on any thread, what runs in the background, and nothing inside of what counts as a whole."""
    meter = WorkMeter(1.0)
    seen = []
    gram = np.eye(20)

    def stage() -> Any:
        seen.append((yield from meanwhile(lambda: NUMPY.eigenvalues(gram))))

    source = pair(40, 20, np.float64)
    with product_threads(threads), meter.matrix("a", 1.0) as work, work_counted_in(work):
        in_parts(lambda part: None, 5, 100.0)
        assert work.done == pytest.approx(100.0)
        with counted(7.0):
            in_parts(lambda part: count_work(1000.0), 1, 1000.0)
        assert work.done == pytest.approx(107.0)
        run_together(source, stage())
        assert work.done == pytest.approx(107.0 + eigenvalues_work(20, 8))
    count_work(5.0)
    assert work.done == pytest.approx(107.0 + eigenvalues_work(20, 8)) and len(seen) == 1


@pytest.mark.parametrize("mode", ["randomized", "exact"])
@pytest.mark.parametrize("bounded", [False, True])
def test_a_run_tells_of_its_spectra(mode: Any, bounded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of work, not of tensors: there is one that matters."""
    memory = resident() + (400 << 20) if bounded else 0
    monkeypatch.setattr("ckptdiff.events.Stage", partial(Stage, often=0.0))
    monkeypatch.setattr("ckptdiff.spectra.stage.in_order", partial(in_order, patience=0.001))
    rng = np.random.default_rng(0)
    weights = {"lm_head.weight": rng.standard_normal((3000, 500)), "norm": rng.standard_normal(500)}
    for side, size in (("base", 0.0), ("tuned", 0.01)):
        moved = {name: (values + size * rng.standard_normal(values.shape)) for name, values in weights.items()}
        save_file({name: v.astype(ml_dtypes.bfloat16) for name, v in moved.items()}, tmp_path / f"{side}.safetensors")
    events: list[Event] = []
    paths = [tmp_path / f"{side}.safetensors" for side in ("base", "tuned")]
    ckptdiff.diff(*paths, spectra=mode, max_memory=memory, listener=events.append, threads=2)
    told = told_stages(events)
    assert list(told)[-2:] == ["comparing", "spectra"]
    assert len({event.done for event in told["spectra"]}) > 10
    assert {event.what for event in told["spectra"][1:-1]} <= {"lm_head.weight", ""}
