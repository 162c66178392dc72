"""The examples run as they stand, in a process of their own, and say what is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
from safetensors.numpy import load_file

import ckptdiff

ROOT = Path(__file__).parents[1]
PAIR = [str(ROOT / "fixtures/llama" / side) for side in ("base", "tuned")]


def run(*words: str | Path, status: int = 0) -> str:
    """Run a command with this Python's commands first in its path, away from the clone."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # One thread: on a busy machine those of torch wait for each other longer than they compute.
    environment = {**os.environ, "PATH": path, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == status, done.stderr
    return done.stdout


def test_a_comparison_step_by_step() -> None:
    said = run(sys.executable, "examples/compare.py")
    overall = ckptdiff.diff(*PAIR).overall
    assert said.startswith(f"39 tensors, {overall['unchanged_abs']['1e-05']:.1%} of the values")
    assert f"relative update {overall['rel_norm']:.4%}" in said
    assert "gate_proj" in said and "in the mask, by row" in said


def test_masks_by_h5py_alone(tmp_path: Path) -> None:
    source = (ROOT / "examples/read_masks.py").read_text()
    assert not re.search(r"^\s*(import|from) ckptdiff", source, re.MULTILINE)
    run_file, exported = tmp_path / "run.h5", tmp_path / "masks.safetensors"
    odd = [ROOT / "fixtures/odd" / side for side in ("base", "tuned")]
    for pair in (PAIR, odd):
        ckptdiff.diff(*pair, out=run_file, mask="bitwise")
        run(sys.executable, "-m", "ckptdiff", "mask", "export", run_file, "-o", exported)
        names: dict[str, object] = {}
        exec(compile(source, "read_masks.py", "exec"), names)
        masks = dict(names["masks_of"](str(run_file)))
        expected = load_file(exported)
        assert masks.keys() == expected.keys()
        assert all((masks[name] == mask).all() and masks[name].shape == mask.shape for name, mask in expected.items())
    assert run(sys.executable, "examples/read_masks.py", run_file).count(" in the mask") == len(masks)


def test_a_run_without_masks(tmp_path: Path) -> None:
    ckptdiff.diff(*PAIR, out=tmp_path / "run.h5", mask="none")
    with h5py.File(tmp_path / "run.h5") as file:
        assert not len(file["masks"])
    run(sys.executable, "examples/read_masks.py", tmp_path / "run.h5", status=1)


@pytest.mark.slow
def test_a_shell_pipeline(tmp_path: Path) -> None:
    rows = sorted(ckptdiff.diff(*PAIR).per_tensor, key=lambda row: row["rel_norm"], reverse=True)
    said = run("bash", "examples/pipeline.sh", *PAIR).splitlines()
    assert [line.split()[0] for line in said[:3]] == [f"{row['rel_norm']:.4%}" for row in rows[:3]]
    assert said[3].startswith("relative update: 0.000346")
    run("bash", "examples/pipeline.sh", *PAIR, "1e-4", status=1)
    run("bash", "examples/pipeline.sh", PAIR[0], tmp_path / "nothing", status=2)


@pytest.mark.slow
def test_retraining() -> None:
    pytest.importorskip("torch")
    said = run(sys.executable, "examples/retrain.py")
    before, after = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", said).groups())
    assert after < before
    assert re.search(r"of them moved, and 0 others", said)


@pytest.mark.slow
def test_training_a_subnetwork_that_was_found() -> None:
    for name in ("torch", "transformers", "accelerate"):
        pytest.importorskip(name)
    _, *lines = run(sys.executable, "examples/subnetwork.py").splitlines()
    rows = [re.findall(r"[\d.]+(?=%|\s|$)", line.replace(",", "")) for line in lines]
    base, tuned, changed, most, drawn = ([float(number) for number in row] for row in rows)
    # Of coordinates, of the energy, loss, distance to the tuned model, and bytes outside.
    assert base[0] == base[1] == 0 and tuned[0] == tuned[1] == base[3] == changed[1] == 100
    assert 30 < changed[0] < 80 and most[0] == drawn[0] == pytest.approx(20, abs=0.5)
    assert drawn[1] == pytest.approx(20, abs=2) and most[1] > 50
    assert tuned[2] < most[2] < drawn[2] < base[2] and changed[2] == pytest.approx(tuned[2], abs=2e-3)
    assert tuned[3] == 0 and changed[3] < 5 < most[3] < drawn[3] < 100
    assert changed[4] == most[4] == drawn[4] == 0
