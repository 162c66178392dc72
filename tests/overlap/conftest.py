"""A base and three updates of it."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from updates import SHAPES, Updates


@pytest.fixture(scope="session")
def updates(tmp_path_factory: pytest.TempPathFactory) -> Updates:
    folder = tmp_path_factory.mktemp("overlap")
    rng = np.random.default_rng(0)
    bf16 = ml_dtypes.bfloat16
    base = {name: (rng.standard_normal(shape) * 0.02).astype(bf16) for name, shape in SHAPES.items()}
    base["model.norm.weight"] = np.ones(31, bf16)
    base["ids"] = np.arange(12)
    tuned = []
    for index in range(3):
        moved = {}
        for name, before in base.items():
            if name == "ids":
                moved[name] = before + (before % 3 == index)
                continue
            chosen = rng.random(before.shape) < (0.1, 0.3, 0.6)[index]
            step = rng.standard_normal(before.shape) * (0.1 if "norm" in name else 3e-5)
            after = np.where(chosen, before.astype(np.float32) + step, before.astype(np.float32)).astype(bf16)
            moved[name] = before if name == "model.norm.weight" and index == 0 else after
        tuned.append(moved)
    save_file(base, folder / "base.safetensors")
    for index, tensors in enumerate(tuned):
        save_file(tensors, folder / f"tuned{index}.safetensors")
    return Updates(folder, base, tuned)


@pytest.fixture(scope="session")
def invoke() -> Callable[..., int]:
    from ckptdiff.cli import main

    return lambda *arguments: main([str(argument) for argument in arguments])
