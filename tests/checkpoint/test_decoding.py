"""Decoded values are those that the libraries decode that wrote the codes, whatever part of a weight is asked for."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patience import PATIENCE
from quantised import LAYOUTS, Sample, save

from ckptdiff.checkpoint import open_checkpoint
from ckptdiff.checkpoint.decoding import Box, DecodingRoom, decode_box
from ckptdiff.checkpoint.encodings import find_encoded
from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.checkpoint.weights import Decoded
from ckptdiff.errors import CheckpointError


def encoded(folder: Path) -> Decoded:
    found = find_encoded(open_checkpoint(folder))
    assert found.warnings == ()
    (weight,) = found.weights.values()
    return weight


def decode(weight: Decoded, rows: tuple[int, int], columns: tuple[int, int], io: str = "pread", **more: bool) -> Box:
    out = np.full((rows[1] - rows[0], columns[1] - columns[0]), np.nan, np.float32)
    with open_shards(io) as shards:
        return decode_box(shards, weight, rows, columns, out, DecodingRoom(), **more)


def assert_equal(got: np.ndarray, sample: Sample, expected: np.ndarray) -> None:
    if not sample.ulps:
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_max_ulp(got, expected, sample.ulps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("io", ["pread", "mmap"])
def test_the_values_are_those_of_the_library_that_wrote_them(layout: str, io: str, tmp_path: Path) -> None:
    sample = LAYOUTS[layout](np.random.default_rng(0), 37, 150)
    weight = encoded(save(tmp_path, sample.tensors, sample.config))
    assert weight.encoding == sample.encoding and weight.shape == sample.expected.shape
    assert {part.name for part in weight.parts} == sample.tensors.keys()
    box = decode(weight, (0, weight.rows), (0, weight.shape[-1]), io)
    assert_equal(box.values, sample, sample.expected.reshape(box.values.shape))
    assert box.odd == Counter()


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_rows_and_columns(layout: str, tmp_path: Path, data: st.DataObject) -> None:
    m, n = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 140))
    sample = LAYOUTS[layout](np.random.default_rng(data.draw(st.integers(0, 9))), m, n)
    weight = encoded(save(tmp_path, sample.tensors, sample.config))
    rows, columns = (
        sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True)))
        for size in (weight.rows, weight.shape[-1])
    )
    box = decode(weight, tuple(rows), tuple(columns), data.draw(st.sampled_from(["pread", "mmap"])))
    whole = sample.expected.reshape(weight.rows, -1)
    assert_equal(box.values, sample, whole[slice(*rows), slice(*columns)])


@pytest.mark.parametrize(
    ("dtype", "of"), [(torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn), (torch.float8_e5m2, ml_dtypes.float8_e5m2)]
)
def test_every_code_of_fp8(dtype: torch.dtype, of: type, tmp_path: Path) -> None:
    """NaN and infinity too, and all scales of two bytes."""
    codes = np.arange(256, dtype=np.uint8)[None].repeat(2, 0)
    for scales in (
        torch.tensor([[1.5], [0.75]], dtype=torch.bfloat16),
        torch.tensor([[3.0], [0.1]], dtype=torch.float16),
    ):
        tensors = {"a.weight": torch.from_numpy(codes).view(dtype), "a.weight_scale": scales}
        box = decode(encoded(save(tmp_path, tensors)), (0, 2), (0, 256), detail=True)
        with np.errstate(invalid="ignore"):
            expected = codes.view(of).astype(np.float32) * scales.float().numpy()
        np.testing.assert_array_equal(box.values, expected)
        assert np.array_equal(np.signbit(box.values), np.signbit(expected)) and np.array_equal(box.fields, codes)


def test_nan_has_the_sign_of_its_code(tmp_path: Path) -> None:
    """Whatever makes it: a code, a scale, or zero times infinity."""
    codes = torch.tensor([0x7F, 0xFF, 0x00, 0x80, 0x38, 0xB8], dtype=torch.uint8).repeat(4, 1)
    scales = torch.tensor([[1.0], [torch.inf], [torch.nan], [-torch.nan]])
    tensors = {"a.weight": codes.view(torch.float8_e4m3fn), "a.weight_scale": scales}
    bits = decode(encoded(save(tmp_path / "fp8", tensors)), (0, 4), (0, 6)).values.view(np.uint32)
    one, infinite, nan = (np.array([code, code | 0x80000000]) for code in (0x3F800000, 0x7F800000, 0x7FC00000))
    of_scale = [[nan, [0, 0x80000000], one], [nan, nan, infinite], [nan, nan, nan], [nan, nan, nan]]
    np.testing.assert_array_equal(bits, np.array(of_scale).reshape(4, 6))
    sample = LAYOUTS["NVFP4 of compressed-tensors"](np.random.default_rng(0), 1, 16)
    sample.tensors["a.weight_packed"][:] = 0x80  # zeros of both signs
    sample.tensors["a.weight_global_scale"].fill_(0)
    values = decode(encoded(save(tmp_path / "nvfp4", sample.tensors, sample.config)), (0, 1), (0, 16)).values
    np.testing.assert_array_equal(values.view(np.uint32)[0, :2], nan)


def test_one_rounding(tmp_path: Path) -> None:
    """A global scale is brought to the exact product; float64 holds all of it."""
    sample = LAYOUTS["NVFP4 of compressed-tensors"](np.random.default_rng(1), 50, 200)
    box = decode(encoded(save(tmp_path, sample.tensors, sample.config)), (0, 50), (0, 208))
    packed, scales = sample.tensors["a.weight_packed"].numpy(), sample.tensors["a.weight_scale"].double().numpy()
    nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(50, 208).view(ml_dtypes.float4_e2m1fn)
    exact = nibbles.astype(np.float64) * scales.repeat(16, 1) / sample.tensors["a.weight_global_scale"].double().numpy()
    np.testing.assert_array_equal(box.values, exact.astype(np.float32))


def neighbours(values: np.ndarray) -> np.ndarray:
    """Distance of each of all values of a format to the next larger magnitude; of the largest, to the one before."""
    magnitudes = np.unique(np.abs(values[np.isfinite(values)]))
    steps = np.append(np.diff(magnitudes), magnitudes[-1] - magnitudes[-2])
    return steps[np.searchsorted(magnitudes, np.abs(values)).clip(max=len(steps) - 1)]


@pytest.mark.parametrize(
    ("layout", "of"),
    [
        ("compressed-tensors fp8, a scale for a row", ml_dtypes.float8_e4m3fn),
        ("NVFP4 of ModelOpt", ml_dtypes.float4_e2m1fn),
        ("NVFP4 of compressed-tensors", ml_dtypes.float4_e2m1fn),
        ("4 bits in words, zero points", None),
    ],
)
def test_steps_are_the_distance_to_the_next_code(layout: str, of: type | None, tmp_path: Path) -> None:
    sample = LAYOUTS[layout](np.random.default_rng(2), 20, 64)
    weight = encoded(save(tmp_path, sample.tensors, sample.config))
    box = decode(weight, (3, 17), (16, 64), detail=True)
    if of is None:
        steps = np.ones(box.fields.shape, np.float32)
    else:
        all_codes = np.arange(256 if of is ml_dtypes.float8_e4m3fn else 16, dtype=np.uint8).view(of)
        steps = neighbours(all_codes.astype(np.float32))[box.fields]
    wide = box.scales.repeat(-(-48 // box.scales.shape[1]), 1)[:, :48] if box.scales.size else None
    if layout.startswith("compressed"):  # no block begins right of the first column
        assert box.scales.shape == (14, 0)
        wide = sample.tensors["a.weight_scale"].numpy()[3:17]
    np.testing.assert_allclose(box.steps, steps * wide, rtol=3e-7)


BAD = {"zero": 0.0, "negative": -1.0, "NaN": np.nan, "infinite": np.inf}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("cuts", [[0, 300], [0, 1, 128, 130, 300]])
def test_odd_scales_are_counted_once_however_the_weight_is_cut(what: str, cuts: list[int], tmp_path: Path) -> None:
    sample = LAYOUTS["DeepSeek fp8"](np.random.default_rng(0), 300, 300)
    sample.tensors["a.weight_scale_inv"][1, 1] = sample.tensors["a.weight_scale_inv"][2, 0] = BAD[what]
    weight = encoded(save(tmp_path, sample.tensors, sample.config))
    odd = Counter()
    for top, bottom in pairwise(cuts):
        for left, right in pairwise(cuts):
            odd += decode(weight, (top, bottom), (left, right)).odd
    assert odd == {("a.weight_scale_inv", what): 2}


@pytest.mark.parametrize("value", [0.0, np.nan])
@pytest.mark.parametrize("layout", ["NVFP4 of compressed-tensors", "NVFP4 of ModelOpt"])
def test_an_odd_global_scale(layout: str, value: float, tmp_path: Path) -> None:
    sample = LAYOUTS[layout](np.random.default_rng(0), 8, 32)
    name = "a.weight_global_scale" if "a.weight_global_scale" in sample.tensors else "a.weight_scale_2"
    sample.tensors[name].fill_(value)
    weight = encoded(save(tmp_path, sample.tensors, sample.config))
    odd = Counter()
    for rows in ((0, 3), (3, 8)):
        for columns in ((0, 16), (16, 32)):
            odd += decode(weight, rows, columns).odd
    assert odd == {(name, "NaN" if np.isnan(value) else "zero"): 1}


def test_a_power_that_is_none(tmp_path: Path) -> None:
    sample = LAYOUTS["MXFP8"](np.random.default_rng(0), 4, 64)
    sample.tensors["a.weight_scale"][2, 1] = 255
    sample.tensors["a.weight_scale"][1, 0] = 0
    box = decode(encoded(save(tmp_path, sample.tensors, sample.config)), (0, 4), (0, 64))
    assert box.odd == {("a.weight_scale", "NaN"): 1}
    assert np.isnan(box.values[2, 32:]).all() and np.isfinite(box.values[1]).all()
    codes = sample.tensors["a.weight"].float().numpy().astype(np.float64)[1, :32]
    np.testing.assert_array_equal(box.values[1, :32], (codes * 2.0**-127).astype(np.float32))


def test_a_file_that_shrank_is_said(tmp_path: Path) -> None:
    sample = LAYOUTS["DeepSeek fp8"](np.random.default_rng(0), 200, 300)
    weight = encoded(save(tmp_path, sample.tensors, sample.config))
    path = tmp_path / "model.safetensors"
    out = np.empty((200, 10), np.float32)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"), open_shards("pread") as shards:
        decode_box(shards, weight, (0, 200), (0, 10), out, DecodingRoom())
        path.write_bytes(path.read_bytes()[:-30_000])
        decode_box(shards, weight, (0, 200), (0, 10), out, DecodingRoom())


REFUSING = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import numpy as np
from known_kernels import refuse_others
from ckptdiff.run.warm_up import make_call

make_call(None, ("decoded",))
refuse_others()
from ckptdiff.checkpoint import open_checkpoint
from ckptdiff.checkpoint.decoding import DecodingRoom, decode_box
from ckptdiff.checkpoint.encodings import find_encoded
from ckptdiff.checkpoint.kept import count_kept
from ckptdiff.checkpoint.open_shards import open_shards

for folder in sys.argv[1:]:
    (weight,) = find_encoded(open_checkpoint(folder)).weights.values()
    for io in ("pread", "mmap"):
        with open_shards(io) as shards:
            for columns in ((0, weight.shape[-1]), (3, 30)):
                out = np.empty((weight.rows - 1, columns[1] - columns[0]), np.float32)
                decode_box(shards, weight, (1, weight.rows), columns, out, DecodingRoom())
                box = decode_box(shards, weight, (1, weight.rows), columns, out, DecodingRoom(), detail=True)
                count_kept(box, out.copy(), as_bf16=True)
                count_kept(box, box, as_bf16=False)
"""


def test_no_other_kernel_is_called_than_those_compiled_beforehand(tmp_path: Path) -> None:
    folders = []
    for number, layout in enumerate(LAYOUTS):
        sample = LAYOUTS[layout](np.random.default_rng(0), 40, 64)
        folders.append(str(save(tmp_path / str(number), sample.tensors, sample.config)))
    command = [sys.executable, "-c", REFUSING, *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
