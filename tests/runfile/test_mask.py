from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from run_samples import SHAPES, Sample, counted, write

from ckptdiff.errors import RunFileError
from ckptdiff.measure.histograms import HistogramRows
from ckptdiff.runfile.mask import Mask
from ckptdiff.runfile.reader import RunFile


@pytest.mark.parametrize("name", SHAPES)
def test_every_form_of_a_mask(sample: Sample, name: str) -> None:
    expected = sample.masks[name]
    with RunFile(sample.path) as run:
        mask = run.masks[name]
        assert (mask.name, mask.shape, mask.numel) == (name, expected.shape, expected.size)
        assert mask.count == expected.sum()
        assert mask.density == (expected.mean() if expected.size else None)
        np.testing.assert_array_equal(mask.dense(), expected)
        assert mask.dense().dtype == np.bool_
        np.testing.assert_array_equal(mask.packed(), np.packbits(expected, bitorder="little"))
        np.testing.assert_array_equal(mask.flat(), np.flatnonzero(expected))
        assert mask.flat().dtype == np.int32


@pytest.mark.parametrize("size", [1, 1000, 131072, 1 << 20])
def test_pieces_make_up_the_whole(sample: Sample, size: int) -> None:
    name = "seven" if size == 1 else "model.layers.0.self_attn.k_proj.weight"
    with RunFile(sample.path) as run:
        pieces = list(run.masks[name].iter_packed(size))
        assert all(piece.size <= size for piece in pieces)
        np.testing.assert_array_equal(np.concatenate(pieces), run.masks[name].packed())


def test_indices_beyond_int32_are_int64() -> None:
    guard: Callable = lambda **_: None  # noqa: E731
    assert Mask("w", (1 << 31,), 0, None, guard).index_dtype == np.int32
    assert Mask("w", (1 << 31, 2), 0, None, guard).index_dtype == np.int64


def test_padding_bits_of_other_writers_are_left_out(tmp_path: Path, make_diff: Callable, make_facts: Callable) -> None:
    mask = np.ones(11, bool)
    diff = counted(make_diff(tensors=[(make_facts("w", (11,)), 0.0)]), {"w": mask})
    write(tmp_path / "run.h5", diff, {"w": mask}, [HistogramRows.empty(1)])
    with h5py.File(tmp_path / "run.h5", "a") as file:
        file["masks/w"][:] = 0xFF
    with RunFile(tmp_path / "run.h5") as run:
        assert run.masks["w"].flat().tolist() == list(range(11))
        assert run.masks["w"].dense().tolist() == [True] * 11


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"chunks": (100,)},
        {"chunks": (100,), "compression": "gzip"},
        {"chunks": (1 << 17,), "compression": "gzip", "shuffle": True},
        {"chunks": (1 << 16,), "compression": "gzip", "fletcher32": True},
    ],
    ids=["contiguous", "not compressed", "small chunks", "shuffled", "with checksums"],
)
def test_masks_as_other_writers_store_them(
    tmp_path: Path, make_diff: Callable, make_facts: Callable, how: dict[str, object]
) -> None:
    mask = np.random.default_rng(0).random((1 << 20) + 1234) < 0.1
    mask[: 1 << 13] = False  # the first small chunk of zeros is left out
    diff = counted(make_diff(tensors=[(make_facts("w", mask.shape), 0.0)]), {"w": mask})
    write(tmp_path / "run.h5", diff, {"w": mask}, [HistogramRows.empty(1)])
    bits = np.packbits(mask, bitorder="little")
    with h5py.File(tmp_path / "run.h5", "a") as file:
        attributes = dict(file["masks/w"].attrs)
        del file["masks/w"]
        dataset = file.create_dataset("masks/w", bits.shape, np.uint8, **how)
        dataset[1 << 10 :] = bits[1 << 10 :]
        dataset.attrs.update(attributes)
    with RunFile(tmp_path / "run.h5") as run:
        np.testing.assert_array_equal(run.masks["w"].packed(), bits)
        np.testing.assert_array_equal(np.concatenate(list(run.masks["w"].iter_packed(70))), bits)


def test_a_damaged_chunk_names_its_tensor(tmp_path: Path, make_diff: Callable, make_facts: Callable) -> None:
    mask = np.random.default_rng(0).random(1 << 20) < 0.1
    diff = counted(make_diff(tensors=[(make_facts("w", mask.shape), 0.0)]), {"w": mask})
    for damaged, words in ((b"\0" * 50, "damaged"), (zlib.compress(b"short"), "holds 5 bytes, not 131072")):
        write(tmp_path / "run.h5", diff, {"w": mask}, [HistogramRows.empty(1)])
        with h5py.File(tmp_path / "run.h5", "a") as file:
            file["masks/w"].id.write_direct_chunk((0,), damaged)
        with RunFile(tmp_path / "run.h5") as run, pytest.raises(RunFileError) as caught:
            run.masks["w"].packed()
        assert caught.value.tensor == "w" and words in str(caught.value.found)
        (tmp_path / "run.h5").unlink()


def test_no_masks_under_the_rule_none(tmp_path: Path, make_diff: Callable, make_facts: Callable) -> None:
    write(
        tmp_path / "run.h5",
        make_diff(tensors=[(make_facts("w", (3,)), 0.0)], mask_rule="none"),
        {},
        [HistogramRows.empty(1)],
    )
    with RunFile(tmp_path / "run.h5") as run:
        assert len(run.masks) == 0
        assert "w" not in run.masks
        assert run.masks.rule.kind == "none"
