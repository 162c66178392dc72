"""Experts on a host device: many at a time, each as if it were alone, whichever way they are stored."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from array_libraries import refuse_silent_transfers
from safetensors.numpy import load_file, save_file
from spectra_figures import assert_close, spectral

import ckptdiff
from ckptdiff.errors import DeviceError
from ckptdiff.events import Event, StageProgress
from ckptdiff.files.unfinished import Saving
from ckptdiff.lora import Extraction, extract_lora
from ckptdiff.options import Options, SpectraOptions
from ckptdiff.run.engine import run
from ckptdiff.spectra.budget import ON_GPU, Budget
from ckptdiff.spectra.gpu_panels import GpuStack, slots_bytes
from ckptdiff.spectra.matrices import MatrixView
from ckptdiff.spectra.stacks import in_turn
from ckptdiff.spectra.stage import _by_tensor, _groups_of_a_kind

EXPERTS, INNER, HIDDEN = 4, 24, 40
INSIDE = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts one by one, as most checkpoints hold them, and those with nothing odd in one tensor too."""
    folder, rng = tmp_path_factory.mktemp("experts"), np.random.default_rng(0)
    sides: list[dict[str, Any]] = [{}, {}]
    for expert in range(EXPERTS):
        for name, shape in {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}.items():
            base = (0.02 * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16)
            tuned = (base.astype(np.float32) + 1e-3 * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16)
            if name == "down":
                base, tuned = odd(expert, base.astype(np.float32), tuned.astype(np.float32))
            for side, values in zip(sides, (base, tuned), strict=True):
                side[f"{INSIDE}.{expert}.{name}_proj.weight"] = values.astype(ml_dtypes.bfloat16)
    for side, name in zip(sides, ("base", "tuned"), strict=True):
        save_file(side, folder / f"{name}.safetensors")
        fused = np.stack([side[f"{INSIDE}.{expert}.gate_proj.weight"] for expert in range(EXPERTS)])
        save_file({f"{INSIDE}.down_proj": fused}, folder / f"{name}_fused.safetensors")
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')  # which PEFT has to know
    return folder


def odd(expert: int, base: np.ndarray, tuned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is odd about the down_proj of each expert: NaN, no update, values beyond float32's range, no base."""
    return [
        (base, np.where(np.eye(*base.shape), np.nan, tuned)),
        (base, base),
        (1e-20 * base, 1e-20 * tuned),
        (0 * base, tuned),
    ][expert]


def compared(folder: Path, form: str = "", **options: Any) -> ckptdiff.Diff:
    sides = (folder / f"{side}{form}.safetensors" for side in ("base", "tuned"))
    return ckptdiff.diff(*sides, **{"spectra": "randomized", "device": "cuda"} | options)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "error"), [("randomized", 1e-4), ("exact", 1e-7)])
def test_experts_are_measured_as_by_the_processor(
    folder: Path, on_gpu: Any, monkeypatch: pytest.MonkeyPatch, mode: Any, error: float
) -> None:
    """Gate and up in one stack, down in another, with what is odd; and each in its row again."""
    known = compared(folder, spectra=mode, device="cpu")
    gpu = on_gpu(seed=3)
    refuse_silent_transfers(monkeypatch)
    found = compared(folder, spectra=mode)
    assert_close(spectral(found), spectral(known), error)
    assert sum(row["method"] is None for row in spectral(found).values()) == 2
    panels = Counter(kernel for kernel in gpu.launched if kernel.startswith("panel"))
    # Of 8 KiB each two for gate and up, and one for down; what is beyond float32 comes alone, and then in float64.
    assert panels == ({"panel_float64": 3} if mode == "exact" else {"panel_float32": 4, "panel_float64": 1})
    fused = compared(folder, "_fused", spectra=mode)
    assert_close(spectral(fused), spectral(compared(folder, "_fused", spectra=mode, device="cpu")), error)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["randomized", "exact"])
def test_no_digit_of_an_expert_depends_on_the_others(folder: Path, on_gpu: Any, mode: Any) -> None:
    on_gpu(seed=1)
    together = spectral(compared(folder, spectra=mode))
    for pattern in ("*.2.*", "*.0.up_proj*", "*.3.down_proj*"):
        on_gpu(seed=2)
        for name, row in spectral(compared(folder, spectra=mode, include=[pattern])).items():
            assert json.dumps(row) == json.dumps(together[name])


@pytest.mark.slow
def test_experts_of_a_run_that_was_stopped_are_not_measured_again(folder: Path, on_gpu: Any, tmp_path: Path) -> None:
    """They are kept as soon as their stack is measured, and the others are those of a run in one go."""
    on_gpu(seed=1)
    whole = spectral(compared(folder))
    sides = [str(folder / f"{side}.safetensors") for side in ("base", "tuned")]
    asked = Options(device="cuda", spectra=SpectraOptions())

    def after_the_first(event: Event) -> None:
        if isinstance(event, StageProgress) and event.stage == "spectra" and event.done > 0.5:
            raise InterruptedError

    on_gpu(seed=2)
    with pytest.raises(InterruptedError):
        run(*sides, out=tmp_path / "run.h5", options=asked, listener=after_the_first, saving=Saving(0, 0))
    gpu = on_gpu(seed=3)
    found = spectral(run(*sides, out=tmp_path / "run.h5", options=asked, saving=Saving(0, 0)))
    assert json.dumps(found) == json.dumps(whole)
    panels = Counter(kernel for kernel in gpu.launched if kernel.startswith("panel"))
    assert panels <= Counter({"panel_float32": 2, "panel_float64": 1})  # none of gate and up


class Counted:
    """Calls of a host device, and arrays that went home."""

    def __init__(self, gpu: Any, fetched: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        self._gpu, self._fetched, self._uploads = gpu, fetched, 0
        real = gpu.upload

        def upload(*args: Any) -> None:
            self._uploads += 1
            real(*args)

        monkeypatch.setattr(gpu, "upload", upload)

    @property
    def calls(self) -> tuple[int, int, int]:
        return self._uploads, len(self._gpu.launched), len(self._fetched)


@pytest.mark.slow
def test_calls_and_transfers_are_those_of_stacks_not_of_experts(
    tmp_path: Path, on_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 experts in 16 stacks: each takes as much as one of 2 experts; some pass again over scores, twice at most."""
    rng, counted = np.random.default_rng(0), {}
    fetched = refuse_silent_transfers(monkeypatch)
    base = (0.02 * rng.standard_normal((512, 14, 9))).astype(ml_dtypes.bfloat16)
    tuned = (base.astype(np.float32) + 1e-3 * rng.standard_normal(base.shape)).astype(ml_dtypes.bfloat16)
    for experts in (2, 32, 512):
        for name, side in (("base", base), ("tuned", tuned)):
            save_file({f"{INSIDE}.down_proj": side[:experts]}, tmp_path / f"{name}.safetensors")
        gpu = on_gpu()
        del fetched[:]
        seen = Counted(gpu, fetched, monkeypatch)
        (row,) = spectral(compared(tmp_path)).values()
        assert row["matrices"] == experts
        counted[experts] = seen.calls
    for experts, (uploads, launches, transfers) in counted.items():
        stacks = -(-experts // 32)
        assert uploads == stacks
        # A panel, magnitudes, squares of three matrices, and the scores of four rhos; those again.
        once, passes = 2 + 3 + 4, 4 * 2
        assert once * stacks <= launches <= (once + passes) * stacks
        assert transfers - launches == (counted[2][2] - counted[2][1]) * stacks


def adapter(folder: Path, out: Path, device: str, form: str = "", **asked: Any) -> Extraction:
    sides = (str(folder / f"{side}{form}.safetensors") for side in ("base", "tuned"))
    include = asked.pop("include", ())
    return extract_lora(*sides, out, **{"rank": 5} | asked, options=Options(device=device, include=include))


def products(out: Path) -> dict[str, np.ndarray]:
    """What an adapter adds to each matrix; to experts in one tensor, to all of them."""
    tensors = load_file(out / "adapter_model.safetensors")
    found = {}
    for name, down in tensors.items():
        if "lora_A" in name:
            up = tensors[name.replace("lora_A", "lora_B")]
            count = len(down) // 5 if name.endswith("experts.lora_A.weight") else 1
            ours = down.reshape(count, -1, down.shape[1])
            found[name] = np.einsum("ore,eri->eoi", up.reshape(len(up), -1, count), ours)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("form", "energy"), [("", None), ("", 0.3), ("_fused", None)])
def test_experts_are_factored_as_by_the_processor(
    folder: Path, on_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str, energy: float | None
) -> None:
    """Gate and up in one stack, down in another; and each in its row again."""
    known = adapter(folder, tmp_path / "cpu", "cpu", form, energy=energy)
    gpu = on_gpu(seed=5)
    refuse_silent_transfers(monkeypatch)
    found = adapter(folder, tmp_path / "gpu", "cuda", form, energy=energy)
    panels = Counter(kernel for kernel in gpu.launched if kernel.startswith("panel"))
    # Of 8 KiB each: two for the eight of gate and up, one for down; what is beyond float32 comes alone.
    assert panels == ({"panel_float32": 1} if form else {"panel_float32": 3, "panel_float64": 1})
    for ours, theirs in zip(found.tensors, known.tensors, strict=True):
        assert (ours.name, ours.rank, ours.reason) == (theirs.name, theirs.rank, theirs.reason)
        assert ours.delta_norm == theirs.delta_norm and ours.lost == pytest.approx(theirs.lost, abs=1e-6)
    expected = products(tmp_path / "cpu")
    for name, product in products(tmp_path / "gpu").items():
        size = np.abs(expected[name]).max()
        np.testing.assert_allclose(product, expected[name], rtol=0, atol=1e-5 * size)


@pytest.mark.slow
def test_no_digit_of_an_experts_factors_depends_on_the_others(folder: Path, on_gpu: Any, tmp_path: Path) -> None:
    on_gpu(seed=1)
    adapter(folder, tmp_path / "together", "cuda")
    together = load_file(tmp_path / "together" / "adapter_model.safetensors")
    for expert in (0, 3):
        on_gpu(seed=2)
        adapter(folder, tmp_path / f"{expert}", "cuda", include=(f"*.{expert}.up_proj*",))
        alone = load_file(tmp_path / f"{expert}" / "adapter_model.safetensors")
        factors = {name: values for name, values in alone.items() if values.any()}  # PEFT wants zeros of the others
        assert len(factors) == 2
        for name, values in factors.items():
            np.testing.assert_array_equal(values, together[name])


@pytest.mark.slow
def test_calls_and_transfers_of_an_adapter_are_those_of_stacks(
    tmp_path: Path, on_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 512 experts in 16 stacks, each with one upload, two kernels, and four arrays that go home."""
    rng = np.random.default_rng(0)
    fetched = refuse_silent_transfers(monkeypatch)
    base = (0.02 * rng.standard_normal((512, 14, 9))).astype(ml_dtypes.bfloat16)
    tuned = (base.astype(np.float32) + 1e-3 * rng.standard_normal(base.shape)).astype(ml_dtypes.bfloat16)
    for experts in (2, 32, 512):
        for name, side in (("base", base), ("tuned", tuned)):
            save_file({f"{INSIDE}.down_proj": side[:experts]}, tmp_path / f"{name}.safetensors")
        gpu = on_gpu()
        del fetched[:]
        seen = Counted(gpu, fetched, monkeypatch)
        (tensor,) = adapter(tmp_path, tmp_path / f"{experts}", "cuda").tensors
        assert tensor.rank == 5
        stacks = -(-experts // 32)
        assert seen.calls == (stacks, 2 * stacks, 4 * stacks)


@pytest.mark.slow
def test_an_adapter_of_a_stack_without_memory_comes_one_by_one_and_then_an_error(
    folder: Path, on_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = adapter(folder, tmp_path / "cpu", "cpu", "_fused")
    on_gpu()
    room = GpuStack._room
    monkeypatch.setattr(GpuStack, "_room", lacking_room(lambda panels: bool(panels.stack), room))
    found = adapter(folder, tmp_path / "gpu", "cuda", "_fused")
    assert found.lost == pytest.approx(known.lost, abs=1e-6)
    monkeypatch.setattr("ckptdiff.spectra.gpu_panels.GpuPanels._room", lacking_room(lambda panels: True, room))
    with pytest.raises(DeviceError, match="lacks memory for the spectra of model"):
        adapter(folder, tmp_path / "none", "cuda")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu", "gpu"]


def lacking_room(lacks: Any, room: Any) -> Any:
    def lacking(self: Any, rows: int) -> Any:
        if lacks(self):
            raise MemoryError
        return room(self, rows)

    return lacking


def test_memory_of_a_stack_is_foreseen() -> None:
    """As many of a shape as a panel holds, 32 at most: the shape tells, and the least bound that is taken suffices."""
    budget = Budget.on_gpu(SpectraOptions(), slots_bytes() + ON_GPU.least("randomized"), slots_bytes())
    shapes = {(768, 1024): 21, (2048, 2048): 4, (2880, 2880): 2, (2900, 2900): 1, (24, 40): 32, (1, 1 << 23): 2}
    for (rows, columns), room in shapes.items():
        view = MatrixView(0, rows, columns)
        assert budget.stack(view) == room
        if room > 1:
            assert budget.takes(view) == ON_GPU.stacked(view, 4) <= budget.free
    assert Budget.on_gpu(SpectraOptions("exact", limit=500), 1 << 34, 0).stack(MatrixView(0, 768, 1024)) == 1
    assert Budget(SpectraOptions(), 1 << 34, 0, 4).stack(MatrixView(0, 24, 40)) == 1


@pytest.mark.slow
def test_a_stack_without_memory_is_measured_one_by_one_and_then_an_error(
    folder: Path, on_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = spectral(compared(folder, device="cpu"))
    gpu = on_gpu()
    room, real = GpuStack._room, gpu.empty
    monkeypatch.setattr("ckptdiff.spectra.gpu_panels.GpuPanels._room", lacking_room(lambda one: bool(one.stack), room))
    assert_close(spectral(compared(folder)), known, 1e-4)

    def none(size: int) -> Any:
        if size < 1 << 13:
            raise MemoryError
        return real(size)

    monkeypatch.setattr(gpu, "empty", none)
    with pytest.raises(DeviceError, match="lacks memory for the spectra of model") as caught:
        compared(folder)
    assert "--gpu-memory" in str(caught.value.hint)


def test_matrices_wait_for_their_kind_but_not_for_ever() -> None:
    """Stacks are full or late, results come in any order, and tensors in theirs."""
    kinds = ["rare", *(["a", "a", "b"] * 700), "rare", "alone"]
    jobs: Any = [SimpleNamespace(place=k, index=k // 3, kind=kind, size=1) for k, kind in enumerate(kinds)]
    stacks: list[list[int]] = []

    def measure(batch: Any) -> list[tuple[int, str]]:
        stacks.append([job.place for job in batch])
        return [(job.place, f"{job.place} {job.kind}") for job in batch]

    measuring: Any = SimpleNamespace(kind=lambda job: job.kind, room=lambda job: 1 if job.kind == "alone" else 32)
    groups = list(_groups_of_a_kind(jobs, measuring))
    assert [kinds[group.jobs[0].place] for group in groups if not group.together] == ["alone"]
    found = [one for group in groups for one in measure(group.jobs)]
    assert sorted(place for place, _ in found) == list(range(len(jobs)))
    for places in stacks:
        assert len({kinds[place] for place in places}) == 1 and len(places) <= 32
        assert max(places) - min(places) <= 1024
    assert sum(len(places) == 32 for places in stacks) >= 2100 // 32 - 4
    in_place = ((job.index, one) for job, one in in_turn(jobs, iter(found)))
    tensors = list(_by_tensor(in_place, len(jobs) // 3 + 1))  # type: ignore[arg-type]
    expected = [f"{place} {kind}" for place, kind in enumerate(kinds)]
    assert [one for tensor in tensors for one in tensor.matrices] == expected
