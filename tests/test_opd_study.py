"""The quick form of the study: the pipeline holds together, whatever the science says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import h5py
import ml_dtypes  # noqa: F401  (NumPy's bfloat16)
import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("study")]  # the fixture is the study itself
STUDY = Path(__file__).parents[1] / "bench" / "opd_study" / "run.py"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    run(folder)
    return folder


def run(folder: Path) -> str:
    command = [sys.executable, STUDY, "--out", folder, "--quick"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def results(out: Path, prefix: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((out / "results").glob(f"{prefix}*.json"))]


def test_masked_runs_learn_and_move_nothing_else(out: Path) -> None:
    runs = {(run["optimizer"], run["variant"]): run for run in results(out, "retrain-") if run["seed"] == 0}
    assert {variant for _, variant in runs} == {"full", "opd", "random", "magnitude", "lowest", "sft", "complement"}
    for (_, variant), found in runs.items():
        if variant != "full":  # the run itself has compared every frozen coordinate bit by bit
            assert found["moved"] > 0
            assert found["mask_density"] == pytest.approx(0.8 if variant == "complement" else 0.2, abs=0.01)
    assert runs["adamw", "opd"]["accuracy"] > runs["adamw", "opd"]["base_accuracy"] + 0.1


def test_masks_are_the_largest_changes_of_the_runs_that_made_them(out: Path) -> None:
    folder = out / "checkpoints" / "32"
    base, tuned = (
        {name: value for path in (folder / side).glob("*.safetensors") for name, value in load_file(path).items()}
        for side in ("base-f32", "mask-opd")
    )
    name = "model.layers.0.mlp.up_proj.weight"
    size = np.abs(tuned[name] - base[name]).ravel()
    with h5py.File(folder / "mask-opd-20.h5") as file:
        bits = np.unpackbits(file[f"masks/{name}"][:], bitorder="little", count=size.size).astype(bool)
    assert bits.sum() == size.size // 5
    assert size[bits].min() >= size[~bits].max()


def test_the_figures_are_those_of_the_checkpoints(out: Path) -> None:
    (found,) = [run for run in results(out, "surface-") if run["method"] == "opd" and run["lr"] == 1e-3]
    row, folder = found["rows"][-1], out / "checkpoints" / "32"
    changed = total = 0
    for shard in sorted((folder / "base").glob("*.safetensors")):
        before, after = load_file(shard), load_file(folder / "opd-0.001" / "step20" / shard.name)
        for name, value in before.items():
            changed += np.count_nonzero(value.astype(np.float32) != after[name].astype(np.float32))
            total += value.size
    assert row["bf16"]["global"]["unchanged_bitwise"] == pytest.approx(1 - changed / total)
    assert row["track"]["support"] == changed


def test_a_second_run_goes_on_where_the_first_one_stopped(out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (out / "results").iterdir()}
    removed = next(path for path in before if path.name.startswith("retrain-adamw-random"))
    was = json.loads(removed.read_text())
    removed.unlink()
    printed = run(out)
    after = {path: path.stat().st_mtime_ns for path in (out / "results").iterdir()}
    assert after.keys() == before.keys()
    assert {path for path in after if after[path] != before[path]} == {removed}
    assert json.loads(removed.read_text())["accuracy"] == was["accuracy"]
    assert printed.endswith((out / "report.md").read_text() + "\n")
    assert "| claim |" in printed
