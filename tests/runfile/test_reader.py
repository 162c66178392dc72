from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from run_samples import Sample, write

import ckptdiff
from ckptdiff.errors import RunFileError
from ckptdiff.figures.result import Diff
from ckptdiff.measure.histograms import HistogramRows
from ckptdiff.options import MaskRule
from ckptdiff.runfile.reader import RunFile


def assert_same(loaded: Diff, written: Diff) -> None:
    for field in fields(Diff):
        if field.name != "columns":
            assert getattr(loaded, field.name) == getattr(written, field.name), field.name
    assert loaded.columns.keys() == written.columns.keys()
    for name, values in written.columns.items():
        assert loaded.columns[name].dtype == values.dtype
        np.testing.assert_array_equal(loaded.columns[name], values)


def test_what_was_written_comes_back(sample: Sample) -> None:
    with RunFile(sample.path) as run:
        assert_same(run.load(), sample.diff)


def test_special_results_come_back(tmp_path: Path, troubled_diff: Diff, make_diff: Callable) -> None:
    for diff in (troubled_diff, make_diff(tensors=[])):
        without = replace(diff, mask_rule="none", columns={**diff.columns, "masked": diff.columns["masked"] * 0})
        rows = [HistogramRows.empty(1) for _ in diff.tensors]
        write(tmp_path / "run.h5", without, {}, rows)
        with RunFile(tmp_path / "run.h5") as run:
            assert_same(run.load(), without)
            assert run.load().per_tensor == without.per_tensor


def test_attributes_provenance_and_names(sample: Sample) -> None:
    with RunFile(sample.path) as run:
        assert run.attributes == {
            "format": "ckptdiff-run",
            "format_version": 1,
            "ckptdiff_version": ckptdiff.__version__,
            "title": "a title ??",
            "complete": 1,
        }
        assert run.provenance["run"]["seconds"] == 0.1 + 0.2
        assert run.names == tuple(sample.masks)


def test_a_run_file_of_the_first_release_tells_the_grid_by_the_rounding_null(sample: Sample, tmp_path: Path) -> None:
    path = Path(shutil.copy(sample.path, tmp_path / "run.h5"))
    with h5py.File(path, "a") as file:
        nulls = file["tensors/low_coverage_null_0.01"][()]
        numel = file["tensors/numel"][()]
        for name in ("off_grid", "unchanged_null", "stored_norm", "absorbed_norm"):
            del file[f"tensors/{name}"]
    with RunFile(path) as run:
        diff = run.load()
    off_grid = diff.columns["off_grid"]
    assert off_grid.dtype == np.uint64
    assert off_grid.tolist() == [n if np.isnan(null) else 0 for n, null in zip(numel, nulls, strict=True)]
    assert 0 < np.count_nonzero(off_grid) < len(off_grid)
    assert (diff.overall["unchanged_null"], diff.overall["absorbed_energy"]) == (None, None)


def test_histograms_by_tensor_name(sample: Sample) -> None:
    with RunFile(sample.path) as run:
        assert list(run.histograms) == list(sample.masks)
        for name, row in zip(sample.masks, sample.rows, strict=True):
            for field in ("delta", "base", "changed", "ulp"):
                np.testing.assert_array_equal(getattr(run.histograms[name], field), getattr(row, field))
        with pytest.raises(KeyError):
            run.histograms["no such tensor"]


def test_masks_are_a_mapping_in_plan_order(sample: Sample) -> None:
    with RunFile(sample.path) as run:
        assert list(run.masks) == list(sample.masks)
        assert run.masks.rule == MaskRule("abs", 1e-5)
        assert run.masks.compare == "bf16"
        with pytest.raises(KeyError):
            run.masks["no such tensor"]


def refused(path: Path, words: str) -> RunFileError:
    with pytest.raises(RunFileError, match=re.escape(words)) as caught:
        RunFile(path)
    assert caught.value.file == str(path)
    return caught.value


def test_files_that_are_not_run_files(tmp_path: Path) -> None:
    refused(tmp_path / "gone.h5", "cannot read the run file: No such file or directory")
    refused(tmp_path, "not a ckptdiff run file")
    for name, content in {"empty.h5": b"", "text.h5": b"not HDF5 at all"}.items():
        (tmp_path / name).write_bytes(content)
        assert refused(tmp_path / name, "not a ckptdiff run file").found == "a file without the HDF5 signature"
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["data"] = 1
    assert "without it" in str(refused(tmp_path / "other.h5", "not a ckptdiff run file"))
    with h5py.File(tmp_path / "other.h5", "a") as file:
        file.attrs["format"] = "another"
    assert refused(tmp_path / "other.h5", "not a ckptdiff run file").found == "format = another"


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.h5")
    assert refused(tmp_path / "run.h5", "not a ckptdiff run file").found == "not a regular file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(sample: Sample, tmp_path: Path) -> None:
    shutil.copy(sample.path, tmp_path / "run.h5")
    (tmp_path / "run.h5").chmod(0)
    refused(tmp_path / "run.h5", "cannot read the run file: Permission denied")


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("format_version", 2, "written by a newer ckptdiff"),
        ("format_version", 0, "damaged run file"),
        ("format_version", "one", "damaged run file"),
        ("complete", 0, "incomplete"),
    ],
)
def test_attributes_that_forbid_reading(
    sample: Sample, tmp_path: Path, attribute: str, value: object, words: str
) -> None:
    path = Path(shutil.copy(sample.path, tmp_path / "run.h5"))
    with h5py.File(path, "a") as file:
        file.attrs[attribute] = value
    refused(path, words)
    with h5py.File(path, "a") as file:
        del file.attrs[attribute]
    with pytest.raises(RunFileError):
        RunFile(path)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.99])
def test_a_truncated_run_file(sample: Sample, tmp_path: Path, share: float) -> None:
    data = sample.path.read_bytes()
    (tmp_path / "run.h5").write_bytes(data[: int(len(data) * share)])
    refused(tmp_path / "run.h5", "damaged or truncated")


@pytest.mark.parametrize(
    "name", ["tensors/delta_norm", "tensors/shape", "provenance", "unmatched", "tensors", "tensors/layer"]
)
def test_a_missing_part_is_damage(sample: Sample, tmp_path: Path, name: str) -> None:
    path = Path(shutil.copy(sample.path, tmp_path / "run.h5"))
    with h5py.File(path, "a") as file:
        del file[name]
    with RunFile(path) as run, pytest.raises(RunFileError, match="damaged or truncated"):
        run.load()


@pytest.mark.parametrize("name", ["delta_norm", "block", "name", "same_bytes"])
def test_a_column_of_another_length_is_damage(sample: Sample, tmp_path: Path, name: str) -> None:
    path = Path(shutil.copy(sample.path, tmp_path / "run.h5"))
    with h5py.File(path, "a") as file:
        values = file["tensors"][name][:-1]
        del file["tensors"][name]
        file["tensors"][name] = values
    with RunFile(path) as run, pytest.raises(RunFileError, match="damaged or truncated"):
        run.load()


@pytest.mark.parametrize("value", [7, "2_Dense/model.safetensors", [1], {}])
def test_uncompared_weights_that_are_no_names_are_damage(sample: Sample, tmp_path: Path, value: object) -> None:
    path = Path(shutil.copy(sample.path, tmp_path / "run.h5"))
    with h5py.File(path, "a") as file:
        provenance = json.loads(file["provenance"][()])
        provenance["tuned"]["uncompared"] = value
        del file["provenance"]
        file["provenance"] = json.dumps(provenance)
    with RunFile(path) as run, pytest.raises(RunFileError, match="damaged or truncated") as caught:
        run.load()
    assert "/provenance: tuned: uncompared" in str(caught.value.expected)


def test_a_damaged_mask_names_its_tensor(sample: Sample, tmp_path: Path) -> None:
    path = Path(shutil.copy(sample.path, tmp_path / "run.h5"))
    name = "model.layers.0.self_attn.q_proj.weight"
    with h5py.File(path, "a") as file:
        file["masks"][name].id.write_direct_chunk((131072,), b"not deflate", 0)
        file["masks/one"].attrs["shape"] = [9]
    with RunFile(path) as run:
        with pytest.raises(RunFileError, match="damaged") as caught:
            run.masks[name].packed()
        assert caught.value.tensor == name
        with pytest.raises(RunFileError, match="does not fit its tensor"):
            run.masks["one"]


def test_a_closed_run_file_says_so(sample: Sample) -> None:
    with RunFile(sample.path) as run:
        mask = run.masks["one"]
    with pytest.raises(ValueError, match="is closed"):
        mask.packed()


def test_reading_loads_no_compiler() -> None:
    code = "import sys, ckptdiff.runfile.reader, ckptdiff.runfile.export; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
