from __future__ import annotations

import json
import math
import os
import stat
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from run_samples import Sample, add_mask, counted, file_names, random_rows, write

import ckptdiff
from ckptdiff.errors import RunFileError
from ckptdiff.figures.catalogue import COLUMNS
from ckptdiff.measure.histograms import HistogramRows
from ckptdiff.options import MaskRule
from ckptdiff.runfile.schema import TEXT_FACTS
from ckptdiff.runfile.writer import RunFileWriter

RULE = MaskRule("abs", 1e-5)


def link_of(name: str) -> str:
    """Escape a name by the words of the documentation."""
    special = {chr(code) for code in range(0x20)} | {"\x7f", "%", "/"}
    parts = [f"%{ord(c):02X}" if c in special or (c == "." and i == 0) else c for i, c in enumerate(name)]
    return "".join(parts) or "%"


def test_masks_read_with_h5py_and_numpy_alone(sample: Sample) -> None:
    with h5py.File(sample.path) as file:
        for name, mask in sample.masks.items():
            stored = file["masks"][link_of(name)]
            bits = np.unpackbits(stored[:], bitorder="little", count=mask.size)
            np.testing.assert_array_equal(bits.reshape(stored.attrs["shape"]), mask)
        assert len(file["masks"]) == len(sample.masks)
        assert dict(file["masks"].attrs) == {"rule": "abs:1e-05", "compare": "bf16", "bit_order": "little"}


def test_masks_need_the_deflate_filter_only(sample: Sample) -> None:
    with h5py.File(sample.path) as file:
        for name, mask in sample.masks.items():
            dataset = file["masks"][link_of(name)]
            size = math.ceil(mask.size / 8)
            assert (dataset.shape, dataset.dtype) == ((size,), np.uint8)
            if size:
                assert dataset.chunks == (min(size, 131072),)
                plist = dataset.id.get_create_plist()
                assert [plist.get_filter(i)[0] for i in range(plist.get_nfilters())] == [h5py.h5z.FILTER_DEFLATE]


def test_edge_chunks_are_padded_with_zeros(sample: Sample) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    with h5py.File(sample.path) as file:
        dataset = file["masks"][name]
        assert dataset.id.get_num_chunks() == 3
        filter_mask, payload = dataset.id.read_direct_chunk((2 * 131072,))
        data = payload if filter_mask else zlib.decompress(payload)
        assert len(data) == 131072
        assert not any(data[dataset.size - 2 * 131072 :])


def test_hdf5_of_2016_can_read_it(sample: Sample) -> None:
    # Superblock version 3 is what HDF5 1.10 wrote first; later libraries read it too.
    assert sample.path.read_bytes()[:9] == b"\x89HDF\r\n\x1a\n\3"


def test_columns_are_datasets_on_the_scale_of_names(sample: Sample) -> None:
    with h5py.File(sample.path) as file:
        tensors = file["tensors"]
        names = [name.replace("%00", "\0").replace("%25", "%") for name in tensors["name"].asstr()[:]]
        assert names == [tensor.name for tensor in sample.diff.tensors]
        for column in COLUMNS:
            stored = tensors[column.name]
            assert stored.dtype == column.dtype
            assert (stored.attrs["units"], stored.attrs["long_name"]) == (column.units, column.long_name)
            assert stored.dims[0][0] == tensors["name"]
            np.testing.assert_array_equal(stored[:], sample.diff.columns[column.name])
        assert [json.loads(text) for text in tensors["shape"].asstr()] == [list(t.shape) for t in sample.diff.tensors]
        assert tensors["layer"][:3].tolist() == [0, 0, -1]
        assert tensors["same_bytes"][:3].tolist() == [0, 0, 1]
        assert tensors["tuned_name"].asstr()[1:4].tolist() == ["model.layers.0.self_attn.k_proj.weight", "", "seven"]
        for fact in TEXT_FACTS:  # the attribute by which xarray makes strings of bytes
            assert (tensors[fact].dtype.kind, tensors[fact].attrs["_Encoding"]) == ("S", "utf-8")


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("batches", [[1] * 150, [150], [63, 2, 64, 0, 21]])
def test_histograms_have_one_row_per_tensor_in_plan_order(
    tmp_path: Path, make_diff: Callable, make_facts: Callable, batches: list[int], paged: bool
) -> None:
    rng = np.random.default_rng(1)
    tensors = [(make_facts(f"layers.{i}.w", (3,)), 1.0) for i in range(150)]
    rows = [random_rows(rng, size) for size in batches]
    diff = make_diff(tensors=tensors, mask_rule="none")
    write(tmp_path / "run.h5", diff, {}, rows, paged=paged)
    with h5py.File(tmp_path / "run.h5") as file:
        group = file["histograms"]
        fields = {
            "delta_log2": "delta",
            "base_log2": "base",
            "changed_log2": "changed",
            "ulp": "ulp",
        }
        for dataset, field in fields.items():
            assert group[dataset].dtype == np.uint64
            np.testing.assert_array_equal(group[dataset][:], np.concatenate([getattr(row, field) for row in rows]))
        floor = group["log2_floor"][:]
        assert floor[0] == -np.inf
        assert floor[1:].tolist() == list(range(-149, 129))
        assert group["ulp_floor"][:].tolist() == [2**k for k in range(64)]
        for dataset in fields:
            rows_scale, bins_scale = (dimension[0] for dimension in group[dataset].dims)
            assert rows_scale == file["tensors/name"] == group["name"]
            assert bins_scale == group["ulp_floor" if dataset == "ulp" else "log2_floor"]


def test_histograms_that_cannot_be_compressed_are_kept(
    tmp_path: Path, make_diff: Callable, make_facts: Callable
) -> None:
    """No run makes them: counters of any 64 bits, which take more room as Huffman codes than as they are."""
    rng = np.random.default_rng(2)
    rows = HistogramRows(*(rng.integers(0, 2**64, (70, bins), np.uint64) for bins in (279, 279, 279, 64)))
    tensors = [(make_facts(f"layers.{i}.w", (3,)), 1.0) for i in range(len(rows))]
    write(tmp_path / "run.h5", make_diff(tensors=tensors, mask_rule="none"), {}, [rows], paged=True)
    with h5py.File(tmp_path / "run.h5") as file:
        np.testing.assert_array_equal(file["histograms/base_log2"][:], rows.base)
        np.testing.assert_array_equal(file["histograms/ulp"][:], rows.ulp)


def test_root_attributes_say_what_it_is(sample: Sample) -> None:
    with h5py.File(sample.path) as file:
        assert file.attrs["format"] == "ckptdiff-run"
        assert file.attrs["format_version"] == 1
        assert file.attrs["ckptdiff_version"] == ckptdiff.__version__
        assert file.attrs["complete"] == 1
        assert json.loads(file["provenance"][()])["run"]["threads"] == 2
        assert json.loads(file["unmatched"][()])["only_in_base"] == ["b\0", "c/d"]


def test_a_diff_without_tensors_or_masks(tmp_path: Path, make_diff: Callable) -> None:
    write(tmp_path / "run.h5", make_diff(tensors=[], mask_rule="none"), {}, [])
    with h5py.File(tmp_path / "run.h5") as file:
        assert file["tensors/numel"].shape == (0,)
        assert file["histograms/ulp"].shape == (0, 64)
        assert len(file["masks"]) == 0


def chunks_of(mask: h5py.Dataset) -> list[h5py.h5d.StoreInfo]:
    return [mask.id.get_chunk_info(i) for i in range(mask.id.get_num_chunks())] if mask.size else []


def test_pages_hold_the_same(tmp_path: Path, make_diff: Callable, make_facts: Callable) -> None:
    rng = np.random.default_rng(0)
    masks = {f"w{i}": rng.random((i % 7, 1 + 50 * (i % 12))) < (0.5, 0, 0.01)[i % 3] for i in range(300)}
    masks["large"] = rng.random(3 << 20) < 0.5
    diff = make_diff(tensors=[(make_facts(name, mask.shape), 0.5) for name, mask in masks.items()])
    held, stored = [], []
    for paged in (False, True):
        path = tmp_path / f"{paged}.h5"
        write(path, counted(diff, masks), masks, [HistogramRows.empty(len(masks))], paged=paged)
        with h5py.File(path) as file:
            held.append({name: (mask[:].tobytes(), tuple(mask.attrs["shape"])) for name, mask in file["masks"].items()})
            stored.append(
                {
                    name: [(chunk.filter_mask, chunk.size) for chunk in chunks_of(mask)]
                    for name, mask in file["masks"].items()
                }
            )
            assert file.id.get_create_plist().get_file_space_strategy()[0] == (1 if paged else 0)
    assert held[0] == held[1] and stored[0] == stored[1]
    assert {name: shape for name, (_, shape) in held[0].items()} == {name: mask.shape for name, mask in masks.items()}
    assert all(
        bits == np.packbits(mask, bitorder="little").tobytes()
        for (bits, _), mask in ((held[0][name], mask) for name, mask in masks.items())
    )


def test_chunks_of_several_masks_may_come_in_any_order(
    tmp_path: Path, make_diff: Callable, make_facts: Callable
) -> None:
    rng = np.random.default_rng(0)
    masks = {name: rng.random((3, 1 << 20)) < 0.5 for name in "ab"}
    diff = make_diff(tensors=[(make_facts(name, mask.shape), 0.5) for name, mask in masks.items()])
    order = [(name, index) for name in masks for index in range(3)]
    rng.shuffle(order)
    with RunFileWriter(tmp_path / "run.h5", rule=RULE, compare="bf16") as writer:
        for name, index in order:
            packed = np.packbits(masks[name], bitorder="little")[int(index) * 131072 :][:131072]
            writer.add_mask_chunks(name, (3, 1 << 20), int(index), [(packed.tobytes(), 1)])
        writer.add_histograms(HistogramRows.empty(2))
        writer.finish(counted(diff, masks))
    with h5py.File(tmp_path / "run.h5") as file:
        for name, mask in masks.items():
            np.testing.assert_array_equal(np.unpackbits(file["masks"][name][:], bitorder="little"), mask.ravel())


def stored_tensors(path: Path) -> dict[str, tuple[list[Any], dict[str, Any]]]:
    """What ``/tensors`` holds, and its attributes but for references."""
    with h5py.File(path) as file:
        return {
            name: (
                dataset[()].tolist(),
                {key: str(value) for key, value in dataset.attrs.items() if not key.endswith("_LIST")},
            )
            for name, dataset in file["tensors"].items()
        }


def test_facts_that_come_early_are_those_of_the_end(tmp_path: Path, sample: Sample) -> None:
    early = tmp_path / "early.h5"
    with RunFileWriter(early, rule=RULE, compare="bf16") as writer:
        for number, (name, mask) in enumerate(sample.masks.items()):
            if number == 1:
                writer.add_facts(sample.diff.tensors)
            add_mask(writer, name, mask)
        for rows in sample.rows:
            writer.add_histograms(rows)
        writer.finish(sample.diff)
    found = stored_tensors(early)
    assert len(found) > len(COLUMNS) and repr(found) == repr(stored_tensors(sample.path))  # NaN is not equal to itself


def test_facts_of_other_tensors_are_refused(tmp_path: Path, make_diff: Callable, make_facts: Callable) -> None:
    facts = make_facts("w", (3,))
    with start(tmp_path, MaskRule("none")) as writer, pytest.raises(ValueError, match=r"shape \(1,\) for 2 tensors"):
        writer.add_facts([facts, make_facts("v", (3,))])
        writer.add_histograms(HistogramRows.empty(1))
        writer.finish(make_diff(tensors=[(facts, 0.5)], mask_rule="none"))
    assert not list(tmp_path.iterdir())


def test_masks_of_a_shape_that_came_long_ago(tmp_path: Path, make_diff: Callable, make_facts: Callable) -> None:
    """Blanks are kept of some shapes alone, and each mask holds what it was given."""
    rng = np.random.default_rng(3)
    masks = {f"w{i}": rng.random(1 + i % 150) < 0.5 for i in range(300)}
    diff = make_diff(tensors=[(make_facts(name, mask.shape), 0.5) for name, mask in masks.items()])
    write(tmp_path / "run.h5", counted(diff, masks), masks, [HistogramRows.empty(len(masks))], paged=True)
    with h5py.File(tmp_path / "run.h5") as file:
        for name, mask in masks.items():
            assert file["masks"][name][:].tobytes() == np.packbits(mask, bitorder="little").tobytes()
            assert tuple(file["masks"][name].attrs["shape"]) == mask.shape
    assert file_names(tmp_path) == ["run.h5"]


def start(tmp_path: Path, rule: MaskRule = RULE, paged: bool = False) -> RunFileWriter:
    return RunFileWriter(tmp_path / "run.h5", rule=rule, compare="bf16", paged=paged)


def test_wrong_use_is_refused(tmp_path: Path, make_diff: Callable, make_facts: Callable) -> None:
    shape = (2, 1 << 20)
    diff = make_diff(tensors=[(make_facts("w", shape), 0.5)])
    zeros = bytes(131072)
    with start(tmp_path) as writer, pytest.raises(ValueError, match="out of range"):
        writer.add_mask_chunks("w", shape, 2, [(zeros, 1)])
    with start(tmp_path) as writer, pytest.raises(ValueError, match="added before"):
        writer.add_mask_chunks("w", shape, 0, [(zeros, 1)])
        writer.add_mask_chunks("w", shape, 0, [(zeros, 1)])
    for paged in (False, True):
        with start(tmp_path, paged=paged) as writer, pytest.raises(ValueError, match="no mask expected for 'v'"):
            writer.add_mask_chunks("v", (8,), 0, [(b"1", 1)])
            writer.add_mask_chunks("v", (8,), 0, [(b"1", 1)])
        with start(tmp_path, paged=paged) as writer, pytest.raises(ValueError, match="out of range"):
            writer.add_mask_chunks("v", (8,), 1, [(b"1", 1)])
    with start(tmp_path) as writer, pytest.raises(ValueError, match="chunks are missing in the masks of w"):
        writer.add_mask_chunks("w", shape, 0, [(zeros, 1)])
        writer.add_histograms(HistogramRows.empty(1))
        writer.finish(diff)
    with start(tmp_path) as writer, pytest.raises(ValueError, match="not those of the compared tensors: w"):
        writer.add_histograms(HistogramRows.empty(1))
        writer.finish(diff)
    with start(tmp_path) as writer, pytest.raises(ValueError, match="0 rows of histograms for 1 tensors"):
        add_mask(writer, "w", np.zeros(shape, bool))
        writer.finish(diff)
    with start(tmp_path, MaskRule("none")) as writer, pytest.raises(ValueError, match="no mask expected"):
        writer.begin_mask("w", shape)
    with start(tmp_path) as writer, pytest.raises(ValueError, match="columns that are not those"):
        add_mask(writer, "w", np.zeros(shape, bool))
        writer.add_histograms(HistogramRows.empty(1))
        writer.finish(replace(diff, columns={**diff.columns, "more": np.zeros(1)}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_nothing_is_left_and_the_target_is_untouched_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "run.h5"
    target.write_bytes(b"before")
    with pytest.raises(error), RunFileWriter(target, rule=RULE, compare="bf16") as writer:
        add_mask(writer, "w", np.ones((40, 40), bool))
        raise error
    assert target.read_bytes() == b"before"
    assert file_names(tmp_path) == ["run.h5"]


def test_leaving_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with start(tmp_path):
        assert [name.startswith(".run.h5.") for name in file_names(tmp_path)] == [True]
    assert not list(tmp_path.iterdir())


def test_a_run_file_is_replaced_whole(tmp_path: Path, make_diff: Callable) -> None:
    for title in ("one", "two"):
        write(tmp_path / "run.h5", make_diff(tensors=[], mask_rule="none"), {}, [], title=title)
    with h5py.File(tmp_path / "run.h5") as file:
        assert file.attrs["title"] == "two"
    assert file_names(tmp_path) == ["run.h5"]


def test_mode_follows_the_umask(tmp_path: Path, make_diff: Callable) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "run.h5", make_diff(tensors=[], mask_rule="none"), {}, [])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "run.h5").stat().st_mode) == 0o640


def test_a_symbolic_link_keeps_pointing_to_the_new_run_file(tmp_path: Path, make_diff: Callable) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run.h5").symlink_to("disk/real.h5")
    write(tmp_path / "run.h5", make_diff(tensors=[], mask_rule="none"), {}, [])
    assert (tmp_path / "run.h5").is_symlink()
    assert file_names(tmp_path / "disk") == ["real.h5"]


def test_long_names_leave_room_for_the_temporary_one(tmp_path: Path, make_diff: Callable) -> None:
    write(tmp_path / ("ü" * 126 + ".h5"), make_diff(tensors=[], mask_rule="none"), {}, [])
    assert file_names(tmp_path) == ["ü" * 126 + ".h5"]


def test_a_folder_that_went_away_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFileError, match="cannot create the output: No such file"):
        RunFileWriter(tmp_path / "gone" / "run.h5", rule=RULE, compare="bf16").__enter__()
