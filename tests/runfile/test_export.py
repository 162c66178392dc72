from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from run_samples import Sample, counted, file_names, write
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ckptdiff.errors import OptionError, RunFileError
from ckptdiff.measure.histograms import HistogramRows
from ckptdiff.runfile.export import export_masks
from ckptdiff.runfile.reader import RunFile

LAYOUTS = ["bool", "packed", "flat", "coo"]


def expected(mask: np.ndarray, layout: str) -> np.ndarray:
    if layout == "bool":
        return mask
    if layout == "packed":
        return np.packbits(mask.ravel(), bitorder="little")
    if layout == "coo":
        return np.stack(np.nonzero(mask)) if mask.ndim else np.empty((0, mask.sum()), np.int64)
    return np.flatnonzero(mask).astype(np.int32)


def assert_equal(found: np.ndarray, wanted: np.ndarray) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_safetensors(sample: Sample, tmp_path: Path, layout: str) -> None:
    target = tmp_path / "masks.safetensors"
    with RunFile(sample.path) as run:
        assert export_masks(run, target, layout=layout) == len(sample.masks)
    tensors = load_file(target)
    assert tensors.keys() == sample.masks.keys()
    for name, mask in sample.masks.items():
        assert_equal(tensors[name], expected(mask, layout))
    with safe_open(target, "numpy") as file:
        metadata = file.metadata()
    shapes = json.loads(metadata.pop("shapes"))
    assert shapes == {name: list(mask.shape) for name, mask in sample.masks.items()}
    assert metadata == {
        "format": "ckptdiff-masks",
        "layout": layout,
        "rule": "abs:1e-05",
        "compare": "bf16",
        "bit_order": "little",
    }
    assert file_names(tmp_path) == [target.name]


def test_torch_makes_sparse_tensors_of_coo(sample: Sample, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    target = tmp_path / "masks.safetensors"
    with RunFile(sample.path) as run:
        export_masks(run, target, layout="coo")
    for name, indices in load_file(target).items():
        mask = sample.masks[name]
        sparse = torch.sparse_coo_tensor(
            torch.from_numpy(indices),
            torch.ones(indices.shape[1], dtype=torch.bool),
            mask.shape,
            check_invariants=True,
            is_coalesced=True,
        )
        assert np.array_equal(sparse.to_dense().numpy(), mask)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_npz(sample: Sample, tmp_path: Path, layout: str) -> None:
    target = tmp_path / "masks.npz"
    with RunFile(sample.path) as run:
        export_masks(run, target, layout=layout)
    with np.load(target, allow_pickle=False) as archive:
        arrays = dict(archive)
    metadata = json.loads(str(arrays.pop("__metadata__")))
    assert (metadata["layout"], metadata["rule"]) == (layout, "abs:1e-05")
    assert len(arrays) == len(sample.masks)
    assert not [name for name in arrays if "/" in name or name.startswith(".")]
    assert_equal(arrays["%2E.%2F..%2Fetc%2Fpasswd"], expected(sample.masks["../../etc/passwd"], layout))
    for name in ("scalar", "empty", "experts", "model.layers.0.self_attn.k_proj.weight"):
        assert_equal(arrays[name], expected(sample.masks[name], layout))


def test_names_and_globs(sample: Sample, tmp_path: Path) -> None:
    target = tmp_path / "masks.safetensors"
    with RunFile(sample.path) as run:
        export_masks(run, target, names=["*.k_proj.*", "one", "model.layers.0.*"])
        assert set(load_file(target)) == {
            "model.layers.0.self_attn.k_proj.weight",
            "model.layers.0.self_attn.q_proj.weight",
            "one",
        }
        with pytest.raises(OptionError, match="no mask of that name") as caught:
            export_masks(run, target, names=["one", "two"])
        assert caught.value.found == "two"


def test_an_exact_name_wins_over_a_glob(tmp_path: Path, make_diff: Callable, make_facts: Callable) -> None:
    masks = {"w[0]": np.ones(3, bool), "w0": np.zeros(3, bool)}
    diff = counted(make_diff(tensors=[(make_facts(name, (3,)), 0.5) for name in masks]), masks)
    write(tmp_path / "run.h5", diff, masks, [HistogramRows.empty(1)] * 2)
    with RunFile(tmp_path / "run.h5") as run:
        export_masks(run, tmp_path / "m.safetensors", names=["w[0]"])
    assert list(load_file(tmp_path / "m.safetensors")) == ["w[0]"]


def test_options_that_cannot_be_used(sample: Sample, tmp_path: Path) -> None:
    with RunFile(sample.path) as run:
        with pytest.raises(OptionError, match="unknown layout"):
            export_masks(run, tmp_path / "m.npz", layout="dense")
        with pytest.raises(OptionError, match="unknown export format"):
            export_masks(run, tmp_path / "m.pt")
        with pytest.raises(RunFileError, match="folder does not exist"):
            export_masks(run, tmp_path / "gone" / "m.npz")


@pytest.mark.parametrize("name", ["m.safetensors", "m.npz"])
def test_only_an_export_is_replaced(sample: Sample, tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    if target.suffix == ".npz":
        np.savez(target, weights=np.ones(3))
    else:
        save_file({"weights": np.ones(3)}, target, metadata={"format": "pt"})
    before = target.read_bytes()
    with RunFile(sample.path) as run:
        with pytest.raises(RunFileError, match="is not an export of masks"):
            export_masks(run, target)
        assert target.read_bytes() == before
        target.unlink()
        export_masks(run, target, layout="packed")
        first = target.read_bytes()
        export_masks(run, target, layout="packed")
        assert target.read_bytes() == first


def test_a_run_without_masks(tmp_path: Path, make_diff: Callable) -> None:
    write(tmp_path / "run.h5", make_diff(tensors=[], mask_rule="none"), {}, [])
    with RunFile(tmp_path / "run.h5") as run, pytest.raises(RunFileError, match="holds no masks"):
        export_masks(run, tmp_path / "m.npz")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["m.safetensors", "m.npz"])
def test_a_count_that_the_mask_contradicts_leaves_no_file(
    sample: Sample, tmp_path: Path, name: str, layout: str
) -> None:
    path = tmp_path / "run.h5"
    path.write_bytes(sample.path.read_bytes())
    with h5py.File(path, "a") as file:
        file["tensors/changed"][0] = 7
    with RunFile(path) as run, pytest.raises(RunFileError, match="as many coordinates as the table says") as caught:
        export_masks(run, tmp_path / name, layout=layout)
    assert caught.value.file == str(path)
    assert file_names(tmp_path) == ["run.h5"]


def test_memory_does_not_grow_with_the_mask(tmp_path: Path, make_diff: Callable, make_facts: Callable) -> None:
    mask = np.zeros((32, 1 << 20), bool)
    mask[:, ::7] = True
    diff = counted(make_diff(tensors=[(make_facts("w", mask.shape), 0.5)]), {"w": mask})
    write(tmp_path / "run.h5", diff, {"w": mask}, [HistogramRows.empty(1)])
    del mask
    with RunFile(tmp_path / "run.h5") as run:
        for layout in LAYOUTS:
            tracemalloc.start()
            export_masks(run, tmp_path / "m.safetensors", layout=layout)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 16 << 20
