"""A base and four later checkpoints with values to test for."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from trajectories import SHAPES, Trajectory

STEPS = 4


@pytest.fixture(scope="session")
def trajectory(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    return make_trajectory("bf16", tmp_path_factory.mktemp("bf16"))


@pytest.fixture(scope="session", params=["bf16", "f32", "mixed", "f16", "norms"])
def any_trajectory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    return make_trajectory(request.param, tmp_path_factory.mktemp(request.param))


def make_trajectory(dtypes: str, folder: Path) -> Trajectory:
    """Checkpoints in one dtype, or float32 and bfloat16 in turns, or bfloat16 with norms in float32."""
    rng = np.random.default_rng(3)
    master = {name: np.array(rng.standard_normal(shape) * 0.02, np.float32) for name, shape in SHAPES.items()}
    master["model.norm.weight"][:4] = [0.0, -0.0, np.nan, np.inf]
    sides = []
    for step in range(1 + STEPS):
        kind = {"mixed": ("f32", "bf16")[step % 2], "norms": "bf16"}.get(dtypes, dtypes)
        dtype = {"bf16": ml_dtypes.bfloat16, "f32": np.float32, "f16": np.float16}[kind]
        with np.errstate(over="ignore"):
            sides.append({name: value.astype(dtype) for name, value in master.items()})
        if dtypes == "norms":
            sides[-1]["model.norm.weight"] = master["model.norm.weight"].copy()
        for value in master.values():
            moves = rng.random(value.shape) < 0.3
            # The same few steps up and down, so that coordinates come back to where they were.
            value += np.where(moves, rng.choice([-1, 1], value.shape) * 2.0**-13, 0).astype(np.float32)
        if step == 2:
            master["model.norm.weight"][:2] *= -1
    paths: list[Path] = []
    for step, tensors in enumerate(sides):
        paths.append(folder / f"step{step}.safetensors")
        save_file({**tensors, "position_ids": np.arange(7) + step}, paths[-1])
    return Trajectory(tuple(paths), tuple(sides))
