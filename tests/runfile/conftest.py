"""A run file made without an engine."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from run_samples import SHAPES, Sample, counted, random_rows, write

from ckptdiff.runfile.compress import compress_chunk


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory, make_diff: Callable, make_facts: Callable) -> Sample:
    rng = np.random.default_rng(3)
    tensors = [(make_facts(name, shape), 0.5) for name, shape in SHAPES.items()]
    tensors[2] = (make_facts("one", (1,), tuned_name="", groups=("a, b", "ü"), same_bytes=True), 1.0)
    tensors[3] = (make_facts("seven", (7,), dtype_base="I64", dtype_tuned="I64", compare="bitwise"), 1.0)
    masks = {name: rng.random(shape) < rng.choice([0.1, 0.5, 0.9]) for name, shape in SHAPES.items()}
    masks["model.layers.0.self_attn.k_proj.weight"][20:] = False
    diff = counted(
        make_diff(
            tensors=tensors,
            only_in_base=("b\x00", "c/d"),
            only_in_tuned=("\x1b",),
            aliased=(("lm_head.weight", "model.embed_tokens.weight"),),
            warnings=("a path that is not UTF-8: /data/\udcff",),
            run={"device": "cpu", "threads": 2, "seconds": 0.1 + 0.2, "nothing": None},
        ),
        masks,
    )
    rows = [random_rows(rng, 1) for _ in tensors]
    path = tmp_path_factory.mktemp("runs") / "run.h5"
    write(path, diff, masks, rows, title="a title \udcff\x00")
    return Sample(path, diff, masks, rows)


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """Compile the kernels before hypothesis measures how long anything takes."""
    compress_chunk(np.packbits(np.random.default_rng(0).random(100_000) < 0.1), 12_500)
