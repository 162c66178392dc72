"""Commands call no kernel while they work but those that they loaded, or had compiled, before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from patience import PATIENCE
from safetensors.numpy import save_file

import ckptdiff

TESTS = Path(__file__).parents[1]
BF16 = np.dtype(ml_dtypes.bfloat16)
PAIRS: dict[str, tuple[tuple[Any, Any], int, tuple[int, int], list[str]]] = {
    "bf16": ((BF16, BF16), 2, (300, 200), []),
    "many small": ((BF16, BF16), 1200, (10, 20), []),
    "f32": ((np.float32, np.float32), 2, (300, 200), ["--compare", "stored"]),
    "f64 against bf16": ((np.float64, BF16), 2, (300, 200), ["--compare", "stored", "--mask", "top:5"]),
    "integers": ((np.int32, np.int32), 2, (300, 200), []),
}
"""Dtypes of both sides, tensors, shape, options."""

REFUSING = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from known_kernels import refuse_others
from ckptdiff.run import devices, warm_up
from ckptdiff.cli import main

def load(worker, asked, tell):
    warm_up.load(worker, asked, tell)
    for use in asked.seldom:
        warm_up.make_call(worker, use)
    refuse_others()

devices.load = load
sys.exit(main())
"""


@pytest.mark.parametrize("name", PAIRS)
def test_a_run_calls_no_other_kernel(name: str, tmp_path: Path) -> None:
    dtypes, count, shape, options = PAIRS[name]
    rng = np.random.default_rng(0)
    scale = 1e5 if name == "integers" else 1
    base = [scale * 0.05 * rng.standard_normal(shape) for _ in range(count)]
    tuned = [values + scale * 3e-4 * rng.standard_normal(shape) * (rng.random(shape) < 0.5) for values in base]
    paths = [tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"]
    for path, tensors, dtype in zip(paths, (base, tuned), dtypes, strict=True):
        save_file({f"layers.{i}.w": values.astype(dtype) for i, values in enumerate(tensors)}, path)
    command = [sys.executable, "-c", REFUSING, "diff", *map(str, paths), "-o", str(tmp_path / "run.h5"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr


REFUSING_LATER = f"""
import importlib, sys
sys.path.insert(0, {str(TESTS)!r})
from known_kernels import refuse_others
from ckptdiff.run import warm_up
from ckptdiff.cli import main

def load(worker, asked, tell):
    warm_up.load(worker, asked, tell)
    refuse_others()

importlib.import_module(sys.argv.pop(1)).load = load
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("spectra.stage", ["diff", "base", "tuned", "--spectra", "exact"]),
        ("spectra.stage", ["diff", "base", "tuned", "--spectra", "randomized", "--compare", "stored"]),
        ("lora.extract", ["lora", "base", "tuned", "-o", "adapter", "--rank", "2"]),
        ("track.follow", ["track", "base", "tuned"]),
        ("track.follow", ["track", "base", "tuned", "tuned", "--gram", "--spectra"]),
        ("track.follow", ["overlap", "run.h5", "run.h5", "--values"]),
        ("overlap.combine", ["mask", "combine", "--union", "run.h5", "run.h5", "-o", "both.h5"]),
    ],
)
def test_no_other_command_compiles_while_it_works(module: str, words: list[str], tmp_path: Path) -> None:
    """What it calls was loaded, or compiled, before: a stage of its own tells of that."""
    rng = np.random.default_rng(0)
    shape = (400, 300)
    for side, dtype in (("base", np.float32), ("tuned", BF16)):
        folder = tmp_path / side
        folder.mkdir()
        weights = {"model.layers.0.mlp.up_proj.weight": rng.standard_normal(shape), "norm": np.ones(9)}
        save_file({name: values.astype(dtype) for name, values in weights.items()}, folder / "model.safetensors")
    if "run.h5" in words:
        paths = [str(tmp_path / side) for side in ("base", "tuned")]
        ckptdiff.diff(*paths, out=tmp_path / "run.h5", mask="bitwise")
    command = [sys.executable, "-c", REFUSING_LATER, f"ckptdiff.{module}", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
