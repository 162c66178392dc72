"""The library's front door: what is exported, what importing it costs, and one whole use."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from told_stages import told_stages

import ckptdiff
from ckptdiff.events import Finished, StageProgress, Started, TensorsDone

LLAMA = Path(__file__).parent.parent / "fixtures" / "llama"


def test_the_public_names_are_these():
    assert ckptdiff.__all__ == [
        "Checkpoint",
        "CkptdiffError",
        "Diff",
        "Mask",
        "MaskRule",
        "Options",
        "RunFile",
        "TensorFacts",
        "TensorInfo",
        "__version__",
        "diff",
        "open_checkpoint",
    ]
    for name in ckptdiff.__all__:
        assert getattr(ckptdiff, name).__doc__ or name == "__version__"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ckptdiff.nonsense  # noqa: B018


def test_importing_loads_no_numerical_library():
    code = "import sys, ckptdiff; print(sorted({'numpy', 'numba', 'h5py', 'torch', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_one_whole_use(tmp_path):
    out, events = tmp_path / "run.h5", []
    diff = ckptdiff.diff(
        LLAMA / "base", LLAMA / "tuned", out=out, mask="bitwise", exclude=["*norm*"], listener=events.append
    )
    with ckptdiff.RunFile(out) as run:
        assert run.load().overall == diff.overall
        mask = run.masks["lm_head.weight"]
    assert diff.mask_rule == "bitwise" and not any("norm" in tensor.name for tensor in diff.tensors)
    row = next(i for i, tensor in enumerate(diff.tensors) if tensor.name == "lm_head.weight")
    assert mask.count == diff.columns["numel"][row] - diff.columns["unchanged_bitwise"][row]
    shown = (Started, StageProgress, TensorsDone, Finished)
    kinds = [type(event) for event in events if isinstance(event, shown) and getattr(event, "stage", "") != "compiling"]
    assert kinds[0] is Started and kinds[-1] is Finished
    stages = list(told_stages(events))
    assert stages[stages.index("comparing") :] == ["comparing", "writing"]
    done = [facts for event in events if isinstance(event, TensorsDone) for facts in event.diff.tensors]
    assert tuple(done) == diff.tensors


@pytest.mark.parametrize(
    "options", [{"mask": "abs"}, {"max_memory": "much"}, {"compare": "fp4"}, {"threads": -1}, {"groups": ["a=("]}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ckptdiff.CkptdiffError):
        ckptdiff.diff(LLAMA / "base", LLAMA / "tuned", **options)


def test_squares_beyond_float64_leave_shares_undefined(tmp_path: Path) -> None:
    base = np.array([1.0, -2.0, 1e200, 3.0])
    save_file({"w": base}, tmp_path / "base.safetensors")
    save_file({"w": base + np.array([0.0, 1.0, 3e199, 0.0])}, tmp_path / "tuned.safetensors")
    diff = ckptdiff.diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", compare="stored")
    assert diff.overall["unchanged_bitwise"] == 0.5
    assert diff.overall["max_abs"] == pytest.approx(3e199)
    assert set(diff.overall["coord_energy"].values()) == {None}


@pytest.mark.parametrize("side", ["base", "update"])
def test_sums_beyond_float64_are_no_figures(tmp_path: Path, side: str) -> None:
    rng = np.random.default_rng(5)
    plain, step = rng.normal(size=(40, 50)), rng.normal(size=(40, 50)) * 1e-4 * (rng.random((40, 50)) < 0.3)
    large, far = plain.copy(), step.copy()
    if side == "base":
        large[3, :5] = [1e155, -1e200, 1e308, -1e308, 1e308]
    else:
        far[3, :4] = [1.7e308, 1.7e308, -1.7e308, -1.7e308]  # in sums of both signs
    save_file({"large": large, "plain": plain}, tmp_path / "base.safetensors")
    save_file({"large": large + far, "plain": plain + step}, tmp_path / "tuned.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diff = ckptdiff.diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", compare="stored")
        rows = {facts.name: row for facts, row in zip(diff.tensors, diff.per_tensor, strict=True)}
        shown = [rows["large"], diff.overall, *diff.grouped("module")]
    squares = {"rel_norm", "cosine", "tuned_norm"}
    undefined = squares | ({"base_norm"} if side == "base" else {"delta_norm", "l1", "mean", "delta_energy_share"})
    for row in shown:
        assert {key for key in undefined if row[key] is not None} == set()
        figures = row["unchanged_rel"] if side == "base" else row["coord_energy"]
        assert set(figures.values()) == {None}
    moved = (large + far) - large
    assert rows["large"]["unchanged_abs"]["1e-05"] == np.mean(np.abs(moved) <= 1e-5)
    assert rows["large"]["max_abs"] == np.abs(moved).max()
    delta = (plain + step) - plain
    expected = np.mean(np.abs(delta) <= 1e-3 * np.sqrt(np.mean(plain**2)))
    assert rows["plain"]["unchanged_rel"]["0.001"] == expected
    assert rows["plain"]["rel_norm"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(plain))
    if side == "base":
        with pytest.raises(ckptdiff.CkptdiffError, match="beyond float64"):
            ckptdiff.diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", compare="stored", mask="rel:1")
