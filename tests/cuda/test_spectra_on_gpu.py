"""Spectra and adapters on a real GPU through CuPy (``pytest -m gpu``), beside those of the processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from spectra_figures import assert_close, spectral, write_pair

import ckptdiff
from ckptdiff.errors import DeviceError
from ckptdiff.lora import extract_lora
from ckptdiff.measure.cuda.choice import find_gpu
from ckptdiff.options import Options

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def gpu() -> Any:
    try:
        return find_gpu(0)
    except DeviceError as error:
        pytest.skip(error.problem)


@pytest.mark.parametrize("mode", ["randomized", "exact"])
def test_figures_are_those_of_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    """Kept, streamed and in stacks that are full or not; and no digit differs from run to run."""
    large, small = {"tall": (9000, 1000), "wide": (950, 9000)}, {"a": (1500, 700), "b": (600, 900)}
    sides = write_pair(
        tmp_path, {**large, **small, "model.experts.down": (40, 96, 160), "model.experts.up": (3, 160, 96)}
    )
    known = spectral(ckptdiff.diff(*sides, device="cpu", spectra=mode))
    on_gpu = {"device": "cuda", "spectra": mode, "gpu_memory": "4G"}
    once, again = (spectral(ckptdiff.diff(*sides, **on_gpu)) for _ in range(2))
    assert once == again
    monkeypatch.setattr("ckptdiff.spectra.job.cache_bytes", lambda view, itemsize: 1 << 60)
    streamed = spectral(ckptdiff.diff(*sides, **on_gpu))
    for found in (once, streamed):
        assert_close(found, known, 1e-4 if mode == "randomized" else 1e-7)
    assert [streamed[name] for name in large] == [once[name] for name in large]


def test_an_adapter_is_that_of_the_processor(tmp_path: Path) -> None:
    experts = {"model.layers.0.mlp.experts.down_proj": (40, 96, 160)}
    sides = write_pair(tmp_path, {"model.layers.0.mlp.up_proj.weight": (1500, 700), **experts})
    lost = [
        extract_lora(*sides, tmp_path / device, rank=8, options=Options(device=device, gpu_memory=4 << 30)).lost
        for device in ("cpu", "cuda")
    ]
    assert lost[0] == pytest.approx(lost[1], abs=1e-5)
