"""The small model, and run files of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_model import Model, Task, checkpoint

import ckptdiff


@pytest.fixture(scope="session")
def make_model() -> Callable[..., torch.nn.Module]:
    def make(seed: int = 0, **options: object) -> torch.nn.Module:
        torch.manual_seed(seed)
        return Model(**options)

    return make


@pytest.fixture(scope="session")
def make_task(make_model: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """``make_task()``: a small model that returns its loss."""
    return lambda: Task(make_model())


@pytest.fixture(scope="session")
def run_file(tmp_path_factory: pytest.TempPathFactory, make_model: Callable) -> Path:
    """Masks of about a third of the coordinates of ``make_model()``."""
    folder = tmp_path_factory.mktemp("retrain")
    base = checkpoint(folder / "base", make_model())
    tuned = checkpoint(folder / "tuned", make_model(), moved=0.3)
    ckptdiff.diff(base, tuned, out=folder / "run.h5", mask="bitwise")
    return folder / "run.h5"
