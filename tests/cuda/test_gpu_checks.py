"""The checks for a real GPU notice what is wrong: on a device that counts wrong, and in run files that differ."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
import pytest
from host_gpu import HostGpu

import ckptdiff
from ckptdiff.formats import FORMATS
from ckptdiff.measure.cuda import choice

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def bench_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))


class Mistaken(HostGpu):
    """Takes float16 for bfloat16."""

    def launch(self, formats, kernel, *args):
        super().launch([FORMATS["bf16"] if one.name == "f16" else one for one in formats], kernel, *args)


def test_wrong_kernels_are_told_by_their_formats(libraries, monkeypatch, capsys):
    from gpu_checks import kernel_rows

    monkeypatch.setattr(choice, "find_gpu", lambda index: Mistaken(libraries))
    right, wrong = islice(kernel_rows(5_003, quick=False), 2)
    assert (right["formats"], right["found"], right["wrong"]) == ("bf16-bf16-bf16", "equal", False)
    assert (wrong["formats"], wrong["wrong"]) == ("f16-f16-f16", True)
    assert wrong["found"].startswith("AssertionError")
    assert "assert_partials_equal" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run.h5"
    fixture = ROOT / "fixtures" / "moe"
    ckptdiff.diff(fixture / "base", fixture / "tuned", out=path, device="reference")
    return path


def scaled(dataset, by):
    dataset[...] = dataset[...] * by


def flipped(dataset):
    bits = dataset[...]
    bits.reshape(-1)[3] ^= 1
    dataset[...] = bits


@pytest.mark.parametrize(
    ("name", "change", "differs"),
    [
        ("tensors/delta_norm", lambda dataset: scaled(dataset, 1 + 1e-10), True),
        ("tensors/delta_norm", lambda dataset: scaled(dataset, 1 + 1e-14), False),
        ("tensors/base_dot_delta", lambda dataset: dataset.__setitem__(0, dataset[0] + 1e-6), True),
        ("tensors/coord_energy_5", lambda dataset: scaled(dataset, np.nan), True),
        ("tensors/unchanged_eta", lambda dataset: dataset.__setitem__(2, dataset[2] + 1), True),
        ("histograms/ulp", flipped, True),
        ("masks/model.layers.0.block_sparse_moe.experts.0.w1.weight", flipped, True),
    ],
)
def test_run_files_that_differ_are_told(run_file, tmp_path, name, change, differs):
    from gpu_checks import compared

    other = shutil.copy(run_file, tmp_path / "other.h5")
    with h5py.File(other, "r+") as file:
        change(file[name])
    found = compared(Path(other), run_file)
    assert (found["wrong"], found["differ"]) == ((True, name) if differs else (False, "nothing"))
    assert found["masks"] == found["tensors"] > 10


def test_a_run_file_without_a_mask_differs(run_file, tmp_path):
    from gpu_checks import compared

    other = shutil.copy(run_file, tmp_path / "other.h5")
    with h5py.File(other, "r+") as file:
        del file["masks/model.layers.0.block_sparse_moe.experts.0.w1.weight"]
    assert compared(Path(other), run_file)["differ"] == "masks/model.layers.0.block_sparse_moe.experts.0.w1.weight"
