"""Whole runs with spectra on a host device: codes go up late and in any order, and strict arrays compute there."""

from __future__ import annotations

import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from array_libraries import refuse_silent_transfers
from host_arrays import ArrayGpu, library_on
from safetensors.numpy import load_file
from spectra_figures import assert_close, spectral, write_pair

import ckptdiff
from ckptdiff import doctor
from ckptdiff.cli import main
from ckptdiff.errors import DeviceError, PlanError
from ckptdiff.events import Event, Note
from ckptdiff.formats import FORMATS
from ckptdiff.lora.extract import extract_lora
from ckptdiff.measure.cuda import choice
from ckptdiff.options import Options, SpectraOptions
from ckptdiff.run import planning
from ckptdiff.run.devices import open_device
from ckptdiff.spectra import spectra_gpu as gpu_module
from ckptdiff.spectra.budget import Budget
from ckptdiff.spectra.gpu_panels import GpuPanels, GpuStack, PanelSlots, slots_bytes
from ckptdiff.spectra.matrices import MatrixView
from ckptdiff.spectra.spectra_gpu import open_spectra_gpu
from ckptdiff.spectra.trial import wrong_spectra

pytestmark = pytest.mark.slow

BF16 = ml_dtypes.bfloat16
SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (96, 96),
    "model.layers.0.mlp.down_proj.weight": (64, 200),
    "model.layers.0.mlp.up_proj.weight": (200, 64),
    "model.layers.0.mlp.experts.gate_up_proj": (3, 48, 80),
    "model.wide": (40, 300),
    "model.norm.weight": (64,),
    "model.row": (1, 33),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return write_pair(tmp_path_factory.mktemp("pair"), SHAPES, singles=("model.wide",))


@pytest.mark.parametrize(("mode", "error"), [("randomized", 1e-4), ("exact", 1e-7)])
def test_figures_are_those_of_the_processor(
    pair: tuple[str, str], on_gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any, error: float
) -> None:
    known = ckptdiff.diff(*pair, spectra=mode, out=tmp_path / "cpu.h5", device="cpu")
    gpu = on_gpu(seed=1)
    refuse_silent_transfers(monkeypatch)
    notes: list[Event] = []
    found = ckptdiff.diff(*pair, spectra=mode, out=tmp_path / "gpu.h5", device="cuda", listener=notes.append)
    assert_close(spectral(found), spectral(known), error)
    assert {"panel_float32", "magnitudes_float32", "scores_float32"} <= set(gpu.launched) or mode == "exact"
    assert [note.text for note in notes if isinstance(note, Note) and "spectra on" in note.text]
    with ckptdiff.RunFile(tmp_path / "cpu.h5") as ours, ckptdiff.RunFile(tmp_path / "gpu.h5") as theirs:
        for name in ours.spectra:
            for key, expected in ours.spectra[name].items():
                assert np.allclose(theirs.spectra[name][key], expected, rtol=error, atol=error, equal_nan=True)


def test_no_digit_differs_from_run_to_run(pair: tuple[str, str], on_gpu: Any) -> None:
    """Whatever the order in which the device does what it may do in any order."""
    rows = []
    for seed in (1, 2):
        on_gpu(seed)
        rows.append(json.dumps(spectral(ckptdiff.diff(*pair, spectra="randomized", device="cuda"))))
    assert rows[0] == rows[1]


def test_slots_of_the_spectra_are_taken_when_those_of_the_coordinate_pass_are_gone(
    pair: tuple[str, str], on_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host and on the GPU: what lies idle beside the others would be beyond their bounds."""
    gpu = on_gpu(memory=8 << 30)
    held, taken = [0], []
    locked = gpu.pinned

    def pinned(size: int) -> np.ndarray:
        taken.append((size, held[0], (8 << 30) - gpu.free_memory()[0]))
        block = locked(size)
        held[0] += size
        weakref.finalize(block, lambda: held.__setitem__(0, held[0] - size))
        return block

    monkeypatch.setattr(gpu, "pinned", pinned)
    monkeypatch.setattr(choice, "find_gpu", lambda index: gpu)
    monkeypatch.setattr("ckptdiff.measure.cuda.gpu.CupyGpu", lambda index: gpu)
    monkeypatch.setattr("ckptdiff.measure.self_test.wrong_figures", lambda backend: "")
    monkeypatch.setattr(planning, "open_device", open_device)
    monkeypatch.setattr(gpu_module, "PanelSlots", PanelSlots)
    ckptdiff.diff(*pair, spectra="randomized", device="cuda", threads=2, include=["*proj*"])
    ((locked_beside, on_the_gpu),) = [beside for size, *beside in taken if size == slots_bytes()]
    assert locked_beside == 0 and on_the_gpu < 8 << 20  # the matrices alone; a pipeline takes 166 MiB
    assert taken[-1][0] == slots_bytes() and len(taken) > 3


class Codes:
    """Codes in memory, read as they would be from a file."""

    def __init__(self, rows: int, columns: int, kind: Any, same: bool = False) -> None:
        rng = np.random.default_rng(rows)
        self.view, self.dtype, self.same_bytes, self.work = MatrixView(0, rows, columns), np.dtype(kind), same, 0.0
        self.long, self.short, self.formats = self.view.long, self.view.short, (FORMATS["bf16"],) * 3
        base = (0.02 * rng.standard_normal((rows, columns))).astype(BF16)
        self.sides = [base, base if same else (base.astype(np.float32) * 1.01).astype(BF16)]

    def read_codes(self, side: int, rows: tuple[int, int], columns: tuple[int, int], out: np.ndarray) -> None:
        assert not (side and self.same_bytes)
        part = self.sides[side][slice(*rows), slice(*columns)]
        out[:] = np.ascontiguousarray(part).view(np.uint8).reshape(-1)

    def sample(self, count: int) -> np.ndarray:
        return self.tall[0][:: max(1, self.long // count)]

    @property
    def tall(self) -> list[np.ndarray]:
        sides = [side.astype(self.dtype) for side in self.sides]
        return [side.T if self.view.wide else side for side in (sides[0], sides[1] - sides[0])]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("rows", "columns", "same"), [(90, 20, False), (20, 90, False), (64, 64, True), (1, 50, False), (50, 1, False)]
)
def test_panels_however_small_the_pieces(
    libraries: Any, rows: int, columns: int, same: bool, seed: int, kept: bool
) -> None:
    """Two pieces in flight, uploads late and in any order: a missing wait leaves codes of another piece in a panel."""
    gpu = ArrayGpu(libraries, seed, processors=1)
    library, _ = library_on(gpu, 0)
    for piece in (256, 30):  # some rows, and a part of one
        source = Codes(rows, columns, np.float32, same)
        panels = GpuPanels(source, PanelSlots(library, piece), kept, entries=300)
        for _ in range(2):
            found = [[library.home(side) for side in (panel.base, panel.delta)] for panel in panels.panels()]
            assert len(found) == -(-panels.long // max(1, 300 // panels.short))
            for side, expected in enumerate(source.tall):
                np.testing.assert_array_equal(np.concatenate([parts[side] for parts in found]), expected)
        assert np.array_equal(library.home(panels.sample(5)), source.sample(5))
    assert set(gpu.launched) == {"panel_float32"}


def test_codes_are_read_while_those_before_go_up_and_become_a_panel(libraries: Any) -> None:
    """The host waits for the slot that it needs, and for nothing else: so two pieces are under way."""
    gpu = ArrayGpu(libraries, 0, processors=1)
    library, _ = library_on(gpu, 0)
    source, queued = Codes(64, 32, np.float32), []
    read = source.read_codes

    def noted(side: int, *rest: Any) -> None:
        if not side:
            queued.append(gpu.queued)
        read(side, *rest)

    source.read_codes = noted  # type: ignore[method-assign]
    GpuPanels(source, PanelSlots(library, 512), kept=True)
    assert len(queued) == 8 and queued[0] == 0 and min(queued[1:]) >= 2  # the kernel of the piece before, and an event


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("rows", "columns", "same"), [(90, 20, False), (20, 90, False), (20, 90, True)])
def test_a_stack_however_small_the_pieces(libraries: Any, rows: int, columns: int, same: bool, seed: int) -> None:
    """Pieces of some rows, which may be the end of one matrix and the start of the next, and of a part of a row."""
    gpu = ArrayGpu(libraries, seed, processors=1)
    library, _ = library_on(gpu, 0)
    pairs = [Codes(rows, columns, np.float32, same) for _ in range(3)]
    for k, one in enumerate(pairs):
        one.sides = [np.roll(side, k, 1) for side in one.sides]
    for piece in (2560, 350, 30):
        stack = GpuStack(pairs, PanelSlots(library, piece), 4)
        (panel,) = stack.panels()
        for side, found in enumerate((panel.base, panel.delta)):
            expected = np.stack([*(one.tall[side] for one in pairs), np.zeros((90, 20), np.float32)])
            np.testing.assert_array_equal(library.home(found), expected)
        assert np.array_equal(library.home(stack.sample(5))[:3], np.stack([one.sample(5) for one in pairs]))
        stack.clear(1)
        assert not library.home(panel.base)[1].any() and library.home(panel.base)[2].any()
    assert set(gpu.launched) == {"panel_float32"}


def test_a_read_that_fails_leaves_nothing_under_way(libraries: Any) -> None:
    gpu = ArrayGpu(libraries, 0, processors=1)
    library, _ = library_on(gpu, 0)
    source, slots = Codes(64, 32, np.float32), PanelSlots(library, 256)

    def fail(side: int, rows: tuple[int, int], *rest: Any) -> None:
        if rows[0] > 20:
            raise ckptdiff.CheckpointError("gone")
        read(side, rows, *rest)

    read, source.read_codes = source.read_codes, fail  # type: ignore[method-assign]
    with pytest.raises(ckptdiff.CheckpointError):
        list(GpuPanels(source, slots, False, entries=1 << 10).panels())
    assert gpu.queued == 0


def test_a_matrix_that_does_not_fit_is_streamed(
    pair: tuple[str, str], on_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once memory lacks, which others have taken meanwhile; then an error says what to lower."""
    known = spectral(ckptdiff.diff(*pair, spectra="randomized", device="cpu"))
    made: list[bool] = []
    real = GpuPanels.__init__

    def init(self: Any, stored: Any, slots: Any, kept: bool, entries: int = 1 << 12) -> None:
        made.append(kept)
        if kept:
            raise MemoryError
        real(self, stored, slots, kept, entries)

    monkeypatch.setattr(GpuPanels, "__init__", init)
    on_gpu()
    assert_close(spectral(ckptdiff.diff(*pair, spectra="randomized", device="cuda")), known, 1e-4)
    assert made == [True, False] * 3 + [True, *3 * [False]] + [True, False] * 2  # experts lie in a stack together

    def lacking(self: Any, *args: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(GpuPanels, "__init__", lacking)
    with pytest.raises(DeviceError, match="lacks memory for the spectra of model") as caught:
        ckptdiff.diff(*pair, spectra="randomized", device="cuda")
    assert "--gpu-memory" in str(caught.value.hint)


def test_memory_of_the_gpu_is_told_beforehand_and_kept(
    pair: tuple[str, str], on_gpu: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = on_gpu(memory=6 << 30)
    assert main(["diff", *pair, "--spectra", "exact", "--device", "cuda", "--dry-run"]) == 0
    assert "on cuda:0, " in capsys.readouterr().out
    bound = ["--gpu-memory", "3G", "--format", "json"]
    assert main(["diff", *pair, "--spectra", "exact", "--device", "cuda", "--dry-run", *bound]) == 0
    plan = json.loads(capsys.readouterr().out)["spectra"]
    assert (plan["device"], plan["gpu_memory"], plan["too_large"]) == ("cuda:0", 3 << 30, 0)
    assert plan["projected_gpu_memory"] <= plan["gpu_memory"] < gpu.free_memory()[0]
    budget = Budget.on_gpu(SpectraOptions("exact"), 2 << 30, 0)
    assert "--gpu-memory leaves 2048 MiB" in budget.too_large(MatrixView(0, 11008, 4096))


def test_every_command_takes_the_device(
    pair: tuple[str, str], on_gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run.h5")
    known = spectral(ckptdiff.diff(*pair, spectra="randomized", device="cpu"))
    ckptdiff.diff(*pair, out=run, device="cpu")
    extract_lora(*pair, tmp_path / "cpu", rank=8, options=Options(device="cpu"))
    assert main(["claims", *pair, "--device", "cpu", "--format", "json"]) == 0
    claims = json.loads(capsys.readouterr().out)
    gpu = on_gpu()
    assert main(["spectra", "add", run, "--device", "cuda:0"]) == 0
    with ckptdiff.RunFile(run) as file:
        assert_close(spectral(file.load()), known, 1e-4)
    launched = len(gpu.launched)
    assert main(["lora", *pair, "-o", str(tmp_path / "gpu"), "--rank", "8", "--device", "cuda"]) == 0
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("cpu", "gpu"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.endswith("lora_A.weight") and "expert" not in name:
            up = name.replace("lora_A", "lora_B")
            assert np.allclose(ours[up] @ ours[name], theirs[up] @ theirs[name], atol=1e-5)
    assert len(gpu.launched) > launched
    capsys.readouterr()
    assert main(["claims", *pair, "--device", "cuda", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [claim["outcome"] for claim in found["claims"]] == [claim["outcome"] for claim in claims["claims"]]


@pytest.mark.parametrize("kind", [GpuPanels, GpuStack])
def test_a_trial_sees_what_is_wrong(libraries: Any, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """Of a matrix alone, or of those of a stack alone."""
    library, _ = library_on(ArrayGpu(libraries, 0, processors=1), 0)
    slots = PanelSlots(library, 1 << 13)
    assert wrong_spectra(slots, rows=64) == ""
    real = kind.panels

    def wrong(self: Any) -> Any:
        for panel in real(self):
            yield replace(panel, delta=panel.delta * 1.01)

    monkeypatch.setattr(kind, "panels", wrong)
    found = wrong_spectra(slots, rows=64)
    assert "nss" in found and found.endswith(" of exact spectra")


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_what_keeps_a_gpu_from_measuring(on_gpu: Any, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """With --device cuda an error, with auto a note and the processor; never the processor in silence."""
    gpu, told = on_gpu(), []

    def refused(mode: Any = "randomized", **options: Any) -> str:
        asked = Options(device=device, spectra=SpectraOptions(mode), **options)
        if device == "cuda":
            with pytest.raises((DeviceError, PlanError)) as caught:
                open_spectra_gpu(asked, mode, told.append)
            assert caught.value.hint
            return caught.value.problem
        assert open_spectra_gpu(asked, mode, told.append) is None
        return str(told.pop().text)

    monkeypatch.setattr(gpu, "properties", {"major": 8, "minor": 9}, raising=False)
    assert "float64" in refused("exact")
    assert open_spectra_gpu(Options(device=device, spectra=SpectraOptions()), "randomized", told.append) is not None
    told.clear()
    assert "--max-memory" in refused(max_memory=100 << 20)
    assert "GPU memory" in refused(gpu_memory=500 << 20)
    monkeypatch.setattr(gpu_module, "wrong_spectra", lambda slots: "stable_rank of exact spectra")
    assert "wrong spectra" in refused()

    for error in (RuntimeError("CUSOLVER_STATUS_INTERNAL_ERROR"), np.linalg.LinAlgError("cuSOLVER found 0 of 9")):

        def failing(slots: Any, error: Exception = error) -> str:
            raise error

        monkeypatch.setattr(gpu_module, "wrong_spectra", failing)
        assert str(error) in refused()
    monkeypatch.setattr(gpu_module, "wrong_spectra", lambda slots: str(slots.take()))  # as the first piece does
    monkeypatch.setattr(gpu, "_lockable", 1 << 10)
    assert "lacks memory" in refused()
    monkeypatch.setattr(gpu_module, "find_gpu", choice.find_gpu)
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    assert "CuPy is not installed" in refused()


def test_a_gpu_lost_in_mid_run_ends_in_an_error(
    pair: tuple[str, str], on_gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = on_gpu()

    def lost(event: Any) -> None:
        raise RuntimeError("cudaErrorDevicesUnavailable: GPU has fallen off the bus")

    monkeypatch.setattr(gpu, "record", lambda stream, event: lost(event))
    with pytest.raises(DeviceError, match="fallen off the bus"):
        ckptdiff.diff(*pair, spectra="randomized", out=tmp_path / "run.h5", device="cuda")
    with pytest.raises(DeviceError, match="fallen off the bus"):
        extract_lora(*pair, tmp_path / "adapter", rank=4, options=Options(device="cuda"))
    assert list(tmp_path.iterdir()) == []


def test_doctor_tries_the_spectra_too(on_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu()
    assert doctor._spectra().ok
    monkeypatch.setattr(gpu_module, "wrong_spectra", lambda slots: "stable_rank of exact spectra")
    found = doctor._spectra()
    assert not found.ok and "stable_rank of exact spectra" in found.value and "--device cpu" in found.value
    monkeypatch.setitem(sys.modules, "scipy.linalg", None)
    assert doctor._spectra().value.startswith("not tried: spectra need SciPy")


def test_the_processor_measures_where_it_is_asked_to(on_gpu: Any) -> None:
    on_gpu()
    for device in ("cpu", "reference"):
        assert open_spectra_gpu(Options(device=device), "exact", lambda event: None) is None
