"""How many tasks really run at once: every thread that is asked for has work, on any machine."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE

import ckptdiff
from ckptdiff.events import Event, Note
from ckptdiff.lora import extract_lora
from ckptdiff.lora.factoring import Factoring
from ckptdiff.options import Options, SpectraOptions, parse_size
from ckptdiff.overlap import count
from ckptdiff.run.planning import prepare
from ckptdiff.run.tasks import GRAIN
from ckptdiff.run.worker import Worker
from ckptdiff.spectra.budget import Budget
from ckptdiff.spectra.job import Measuring
from ckptdiff.spectra.matrices import MatrixView
from ckptdiff.track import follow
from ckptdiff.track.follow import track

BLOCK = 2**20
MIB = 2**20
THREADS = [1, 2, 4, 16, 64]


class Crowd:
    """Tasks that wait for each other: the first `size` may only go on once all of them are under way."""

    def __init__(self, size: int) -> None:
        self._gate = threading.Barrier(size)
        self._lock = threading.Lock()
        self._size, self._begun, self._under_way = size, 0, 0
        self.most = 0

    def join(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            with self._lock:
                first = self._begun < self._size
                self._begun += 1
                self._under_way += 1
                self.most = max(self.most, self._under_way)
            try:
                if first:
                    self._gate.wait(PATIENCE)  # raises BrokenBarrierError if the others never come
                return work(*arguments, **named)
            finally:
                with self._lock:
                    self._under_way -= 1

        return call


def sparse(path: Path, shapes: dict[str, tuple[int, int]], first: int = 0) -> str:
    """A bf16 checkpoint of zeros, but for the first coordinate of each tensor, that takes no room on disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        for facts in header.values():
            file.seek(8 + len(text) + facts["data_offsets"][0])
            file.write(struct.pack("<H", first))
    return str(path)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """One tensor of more than a hundred tasks, of spans of sixteen blocks."""
    folder = tmp_path_factory.mktemp("large")
    shapes = {"model.embed_tokens.weight": (66 * 32, BLOCK)}
    return sparse(folder / "base.safetensors", shapes), sparse(folder / "tuned.safetensors", shapes)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """66 tasks of small tensors."""
    folder = tmp_path_factory.mktemp("small")
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (2, 3) for i in range(66 * GRAIN.tensors)}
    return sparse(folder / "base.safetensors", shapes), sparse(folder / "tuned.safetensors", shapes)


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """66 matrices, none of which shares a task with another."""
    folder = tmp_path_factory.mktemp("matrices")
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (1024, 1025) for i in range(66)}
    return sparse(folder / "base.safetensors", shapes), sparse(folder / "tuned.safetensors", shapes, first=0x3F80)


@pytest.fixture(scope="module")
def runs(matrices: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two run files of the matrices."""
    folder = tmp_path_factory.mktemp("runs")
    paths = folder / "one.h5", folder / "two.h5"
    for path in paths:
        ckptdiff.diff(*matrices, out=path, mask="bitwise", device="cpu")
    return paths


class EnoughError(Exception):
    """All that were to come have come."""


def enough(*arguments: Any, **named: Any) -> Any:
    raise EnoughError


@pytest.mark.parametrize("masks", [False, True], ids=["statistics", "masks"])
@pytest.mark.parametrize("threads", THREADS)
def test_every_thread_of_a_comparison_works(
    large: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, masks: bool
) -> None:
    crowd = Crowd(threads)
    monkeypatch.setattr(Worker, "pass_over", crowd.join(enough))
    with pytest.raises(EnoughError):
        ckptdiff.diff(*large, threads=threads, device="cpu", out=tmp_path / "run.h5" if masks else None)
    assert crowd.most == threads


@pytest.mark.parametrize("threads", THREADS)
def test_every_thread_works_on_small_tensors(
    small: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    crowd = Crowd(threads)
    monkeypatch.setattr(Worker, "measure", crowd.join(enough))
    with pytest.raises(EnoughError):
        ckptdiff.diff(*small, threads=threads, device="cpu", out=tmp_path / "run.h5")
    assert crowd.most == threads


def test_an_explicit_bound_lowers_the_threads_and_says_so(
    large: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ckptdiff.run.planning.resident", lambda: 200 * MIB
    )  # this process is of another size each time
    out, notes = tmp_path / "run.h5", list[str]()

    def listen(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    plan = prepare(*large, out=out, options=Options(threads=16, max_memory=400 * MIB))
    assert 4 <= plan.threads < 16 and plan.memory.tasks_waiting >= plan.threads + 1
    crowd = Crowd(plan.threads)
    monkeypatch.setattr(Worker, "pass_over", crowd.join(enough))
    with pytest.raises(EnoughError):
        ckptdiff.diff(*large, out=out, threads=16, max_memory=400 * MIB, device="cpu", listener=listen)
    assert crowd.most == plan.threads
    (note,) = [text for text in notes if "of 16 threads" in text]
    needed = note.rpartition("--max-memory ")[2].removesuffix(" for 16")
    assert note.startswith(f"memory holds {plan.threads} of 16 threads")
    assert prepare(*large, out=out, options=Options(threads=16, max_memory=parse_size(needed))).threads == 16
    less = parse_size(needed) - 2 * MIB
    assert prepare(*large, out=out, options=Options(threads=16, max_memory=less)).threads == 15


def test_a_process_that_is_large_already_gets_all_threads(
    large: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library user may hold a model in memory."""
    monkeypatch.setattr("ckptdiff.memory.machine_memory", lambda: 64 << 30)
    monkeypatch.setattr("ckptdiff.run.planning.resident", lambda: 40 << 30)
    plan = prepare(*large, options=Options(threads=16))
    assert plan.threads == 16 and plan.threads_note == ""
    monkeypatch.setattr("ckptdiff.run.planning.resident", lambda: 64 << 30)
    assert prepare(*large, options=Options(threads=16)).threads == 1


@pytest.mark.parametrize("threads", THREADS)
def test_every_thread_of_a_trajectory_works(
    large: tuple[str, str], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    crowd = Crowd(threads)
    monkeypatch.setattr(follow, "_follow", crowd.join(enough))
    with pytest.raises(EnoughError):
        track(large[0], [large[1]], threads=threads)
    assert crowd.most == threads


@pytest.mark.parametrize("mode", ["randomized", "exact"])
@pytest.mark.parametrize("threads", THREADS)
def test_every_thread_of_the_spectra_works(
    matrices: tuple[str, str], monkeypatch: pytest.MonkeyPatch, threads: int, mode: str
) -> None:
    crowd = Crowd(threads)
    monkeypatch.setattr("ckptdiff.memory.machine_memory", lambda: 1 << 40)
    monkeypatch.setattr(Measuring, "measure_all", crowd.join(enough))
    with pytest.raises(EnoughError):
        ckptdiff.diff(*matrices, threads=threads, device="cpu", spectra=mode)
    assert crowd.most == threads


@pytest.mark.parametrize("threads", THREADS)
def test_every_thread_of_a_low_rank_adapter_works(
    matrices: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    crowd = Crowd(threads)
    monkeypatch.setattr("ckptdiff.memory.machine_memory", lambda: 1 << 40)
    monkeypatch.setattr(Factoring, "_factors", crowd.join(enough))
    with pytest.raises(EnoughError):
        extract_lora(*matrices, tmp_path / "adapter", rank=8, options=Options(threads=threads, device="cpu"))
    assert crowd.most == threads and not list(tmp_path.iterdir())


@pytest.mark.parametrize("threads", THREADS)
def test_every_thread_of_an_overlap_works(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    crowd = Crowd(threads)
    monkeypatch.setattr(count._Counting, "_tensor", crowd.join(enough))
    with pytest.raises(EnoughError):
        count.overlap(runs, threads=threads)
    assert crowd.most == threads


@pytest.mark.slow
def test_no_count_of_an_overlap_depends_on_threads(runs: tuple[Path, Path], matrices: tuple[str, str]) -> None:
    known = count.overlap(runs, base=matrices[0], threads=1)
    for threads in (2, 7):
        found = count.overlap(runs, base=matrices[0], threads=threads)
        for pair, expected in zip(found.pairs, known.pairs, strict=True):
            assert pair.both.tolist() == expected.both.tolist() == [1] * 66
            assert pair.expected.tolist() == expected.expected.tolist()


@pytest.mark.parametrize("threads", [4, 16, 64])
def test_each_thread_can_hold_a_matrix_of_a_large_model(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptdiff.memory.machine_memory", lambda: 1 << 40)
    view = MatrixView(0, 4096, 4096)
    for mode in ("randomized", "exact"):
        budget = Budget.of(Options(threads=threads, spectra=SpectraOptions(mode)), 250 * MIB, [view])
        assert budget.slots(view) == 1 and budget.takes(view) <= budget.share(1)


def test_a_default_bound_leaves_half_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    view = MatrixView(0, 4096, 4096)
    options = Options(threads=64, spectra=SpectraOptions())
    monkeypatch.setattr("ckptdiff.memory.machine_memory", lambda: 8 << 30)
    assert Budget.of(options, 250 * MIB, [view]).bound == 4 << 30
    monkeypatch.setattr("ckptdiff.memory.machine_memory", lambda: 1 << 30)
    assert Budget.of(options, 250 * MIB, [view]).bound == 1_250_000_000
    bounded = replace(options, max_memory=900 * MIB)
    assert Budget.of(bounded, 250 * MIB, [view]).bound == 900 * MIB
