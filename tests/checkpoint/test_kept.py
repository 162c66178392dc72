"""What two sides have in common: equal codes, equal scales, and values within a step of either grid."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from quantised import E4M3, LAYOUTS, Sample, packed_fp4, save

from ckptdiff.checkpoint import open_checkpoint
from ckptdiff.checkpoint.decoding import Box, DecodingRoom, decode_box
from ckptdiff.checkpoint.encodings import find_encoded
from ckptdiff.checkpoint.kept import Kept, count_kept
from ckptdiff.checkpoint.open_shards import open_shards

BLOCKS = [(0, 100, 0, 90), (0, 100, 90, 300), (100, 300, 0, 90), (100, 300, 90, 300)]
"""Of a weight of [300, 300]: parts that fit no blocks."""


def boxes(folder: Path, sample: Sample, cuts: list[tuple[int, int, int, int]]) -> list[Box]:
    (weight,) = find_encoded(open_checkpoint(save(folder, sample.tensors, sample.config))).weights.values()
    found = []
    with open_shards("pread") as shards:
        for top, bottom, left, right in cuts:
            out = np.empty((bottom - top, right - left), np.float32)
            found.append(decode_box(shards, weight, (top, bottom), (left, right), out, DecodingRoom(), detail=True))
    return found


def kept(base: list[Box], tuned: list[Box], *, as_bf16: bool = False) -> Kept:
    first, *others = (count_kept(one, other, as_bf16=as_bf16) for one, other in zip(base, tuned, strict=True))
    return sum(others, first)


def test_codes_equal_and_one_of_four_scales_doubled(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = LAYOUTS["DeepSeek fp8"](rng, 256, 256)
    tuned = Sample({name: tensor.clone() for name, tensor in base.tensors.items()}, base.expected, "FP8", base.config)
    tuned.tensors["a.weight_scale_inv"][1, 0] *= 2
    cuts = [(0, 100, 0, 256), (100, 256, 0, 256)]
    found = kept(boxes(tmp_path / "base", base, cuts), boxes(tmp_path / "tuned", tuned, cuts))
    zeros = int((base.expected[128:, :128] == 0).sum())
    assert (found.values, found.equal_codes) == (256 * 256, 256 * 256)
    assert (found.scales, found.equal_scales) == (4, 3)
    assert found.changed == 128 * 128 - zeros


def test_moved_codes_are_counted_as_numpy_counts_them(tmp_path: Path) -> None:
    """A code of zero has two names; NaN equals none but itself."""
    rng = np.random.default_rng(1)
    base = LAYOUTS["DeepSeek fp8"](rng, 300, 300)
    codes = base.tensors["a.weight"].view(torch.uint8).clone()
    moved = torch.from_numpy(rng.random((300, 300)) < 0.3)
    codes[moved] = torch.from_numpy(rng.integers(0, 256, (300, 300), dtype=np.uint8))[moved]
    codes[0, :4] = torch.tensor([0x80, 0x00, 0x7F, 0xFF])
    base.tensors["a.weight"].view(torch.uint8)[0, :4] = torch.tensor([0x00, 0x80, 0x7F, 0x7E])
    tuned = Sample({**base.tensors, "a.weight": codes.view(E4M3)}, base.expected, "FP8", base.config)
    ours, theirs = boxes(tmp_path / "base", base, BLOCKS), boxes(tmp_path / "tuned", tuned, BLOCKS)
    found = kept(ours, theirs)
    one, other = base.tensors["a.weight"].view(torch.uint8).numpy(), codes.numpy()
    equal = (one == other) | (((one | other) & 0x7F) == 0)
    assert found.equal_codes == np.count_nonzero(equal)
    assert (found.scales, found.equal_scales) == (9, 9)
    assert found.changed == np.count_nonzero(~equal)
    plain = [code.view(ml_dtypes.float8_e4m3fn).astype(np.float64) for code in (one, other)]
    all_values = np.unique(np.abs(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)))
    all_values = all_values[np.isfinite(all_values)]
    steps = np.append(np.diff(all_values), 32.0)
    step = [steps[np.searchsorted(all_values, np.abs(np.nan_to_num(values)))] for values in plain]
    with np.errstate(invalid="ignore"):
        near = np.abs(plain[0] - plain[1]) <= np.maximum(*step)
    assert found.within == np.count_nonzero(near & ~equal)


def test_two_faithful_quantisations_are_within_a_step(tmp_path: Path) -> None:
    """Almost all values differ; what either side rounded is at most half a step of it."""
    rng = np.random.default_rng(2)
    values = rng.normal(0, 0.02, (64, 128)).astype(np.float32)
    peaks = np.abs(values).reshape(64, 8, 16).max(-1)
    factor = np.float32(peaks.max() / (6 * 448))
    scales = (peaks / 6 / factor).astype(ml_dtypes.float8_e4m3fn)
    scales = (scales.view(np.uint8) + (scales.astype(np.float32) * 6 * factor < peaks)).view(ml_dtypes.float8_e4m3fn)
    wide = scales.astype(np.float32).repeat(16, 1) * factor
    nibbles = (values / wide).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    packed = torch.from_numpy(nibbles[:, ::2] | nibbles[:, 1::2] << 4)
    nvfp4 = {"a.weight": packed, "a.weight_scale": torch.from_numpy(scales.view(np.uint8)).view(E4M3)}
    nvfp4["a.weight_scale_2"] = torch.tensor(factor)
    row = np.abs(values).max(1, keepdims=True) / 448
    codes = torch.from_numpy((values / row).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)).view(E4M3)
    fp8 = {"a.weight": codes, "a.weight_scale": torch.from_numpy(row)}
    whole = [(0, 64, 0, 128)]
    (four,), (eight,) = (
        boxes(tmp_path / name, Sample(tensors, values, name), whole) for name, tensors in (("4", nvfp4), ("8", fp8))
    )
    found = count_kept(four, eight, as_bf16=False)
    assert found.within == found.changed > 0.9 * values.size
    assert found.equal_codes is found.scales is found.equal_scales is None
    found = count_kept(values, four, as_bf16=True)
    assert found.within == found.changed > 0.9 * values.size
    assert found.equal_codes is found.scales is None
    moved = values.copy()
    moved[::2] += 4 * four.steps[::2]
    found = count_kept(moved, four, as_bf16=False)
    assert abs(found.within - values.size / 2) < 0.05 * values.size


@pytest.mark.parametrize("as_bf16", [False, True])
def test_what_counts_as_a_change(as_bf16: bool, tmp_path: Path) -> None:
    sample = LAYOUTS["ModelOpt fp8"](np.random.default_rng(3), 20, 30)
    (box,) = boxes(tmp_path, sample, [(0, 20, 0, 30)])
    other = box.values * np.float32(1 + 2**-12)
    found = count_kept(box, other, as_bf16=as_bf16)
    dtype = ml_dtypes.bfloat16 if as_bf16 else np.float32
    assert found.changed == np.count_nonzero(box.values.astype(dtype) != other.astype(dtype))
    assert found.within == found.changed
    assert count_kept(box, -0.0 * box.values, as_bf16=as_bf16).changed == np.count_nonzero(box.values)


def test_one_side_divides_by_its_global_scale_and_the_other_multiplies(tmp_path: Path) -> None:
    """The same weights as both libraries store them: one over a scale is rounded, and no scale has changed by that."""
    rng = np.random.default_rng(4)
    ours = LAYOUTS["NVFP4 of compressed-tensors"](rng, 40, 64)
    theirs = LAYOUTS["NVFP4 of ModelOpt"](rng, 40, 64)
    theirs.tensors["a.weight"] = ours.tensors["a.weight_packed"]
    theirs.tensors["a.weight_scale"] = ours.tensors["a.weight_scale"].clone()
    theirs.tensors["a.weight_scale_2"] = 1 / ours.tensors["a.weight_global_scale"][0]
    whole = [(0, 40, 0, 64)]
    base, tuned = boxes(tmp_path / "base", ours, whole), boxes(tmp_path / "tuned", theirs, whole)
    found = kept(base, tuned, as_bf16=True)
    assert (found.equal_codes, found.scales, found.equal_scales) == (40 * 64, 160, 160)
    np.testing.assert_array_max_ulp(base[0].values, tuned[0].values, 2)
    theirs.tensors["a.weight_scale"].view(torch.uint8)[7, 2] ^= 1
    (moved,) = boxes(tmp_path / "moved", theirs, whole)
    assert kept(base, [moved]).equal_scales == 159


def test_codes_of_other_bits_and_grids_of_other_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    whole = [(0, 24, 0, 64)]
    four, three, rows = (
        boxes(tmp_path / name, LAYOUTS[name](rng, 24, 64), whole)
        for name in ("4 bits in words", "3 bits in words", "4 bits in words, a scale for a row")
    )
    found = kept(four, three)
    assert found.equal_codes is None and found.scales == 24 * 8
    found = kept(four, rows)
    assert found.equal_codes == np.count_nonzero(four[0].fields == rows[0].fields) and found.scales is None


def test_the_packing_of_codes_makes_no_difference(tmp_path: Path) -> None:
    """MXFP4 in the layouts of two libraries."""
    rng = np.random.default_rng(6)
    blocks, scales = packed_fp4(rng, 10, 2, 16), torch.full((10, 2), 120, dtype=torch.uint8)
    gpt = Sample({"a_blocks": blocks, "a_scales": scales}, np.empty(0), "MXFP4")
    ct = Sample({"a.weight_packed": blocks.reshape(10, 32), "a.weight_scale": scales}, np.empty(0), "MXFP4")
    found = kept(boxes(tmp_path / "0", gpt, [(0, 10, 0, 64)]), boxes(tmp_path / "1", ct, [(0, 10, 0, 64)]))
    assert found == Kept(640, 640, 20, 20, 0, 0)
