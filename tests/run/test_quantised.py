"""Quantised weights are compared as the values that the model multiplies with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ckptdiff
from ckptdiff import RunFile
from ckptdiff.cli import main
from ckptdiff.errors import PairingError
from ckptdiff.report.as_json import document

NAME = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS = 256, 384


def weights(seed: int = 0, rows: int = ROWS) -> np.ndarray:
    """Values of the bfloat16 grid."""
    drawn = np.random.default_rng(seed).standard_normal((rows, COLUMNS)).astype(np.float32) * 0.05
    return drawn.astype(ml_dtypes.bfloat16).astype(np.float32)


def tensor(values: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


def fp8_blocks(values: np.ndarray, block: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and the inverse scale of each block."""
    rows, columns = -(-values.shape[0] // block), -(-values.shape[1] // block)
    codes, scales = np.zeros(values.shape, ml_dtypes.float8_e4m3fn), np.zeros((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            at = np.s_[i * block : (i + 1) * block, j * block : (j + 1) * block]
            scales[i, j] = np.abs(values[at]).max() / np.float32(448)
            codes[at] = (values[at] / scales[i, j]).astype(ml_dtypes.float8_e4m3fn)
    return codes, scales


def write_fp8(folder: Path, codes: np.ndarray, scales: np.ndarray, **others: torch.Tensor) -> Path:
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    weight = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn)
    return write(
        folder, {f"{NAME}.weight": weight, f"{NAME}.weight_scale_inv": torch.from_numpy(scales), **others}, config
    )


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def decoded(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    wide = np.repeat(np.repeat(scales, 128, 0), 128, 1)[: codes.shape[0], : codes.shape[1]]
    return codes.astype(np.float32) * wide


def bf16(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def only_row(diff: ckptdiff.Diff) -> dict[str, Any]:
    (row,) = document(diff)["tensors"]
    return row


def test_one_scale_of_six_is_doubled(tmp_path: Path) -> None:
    codes, scales = fp8_blocks(weights())
    other = scales.copy()
    other[1, 2] *= 2
    base, tuned = write_fp8(tmp_path / "base", codes, scales), write_fp8(tmp_path / "tuned", codes, other)
    diff = ckptdiff.diff(base, tuned, out=tmp_path / "run.h5", mask="bitwise")
    row = only_row(diff)
    zeros = np.count_nonzero(codes.astype(np.float32)[128:, 256:] == 0)
    assert row["name"] == f"{NAME}.weight" and row["shape"] == [ROWS, COLUMNS] and row["dtype_base"] == "FP8"
    assert row["unchanged_bitwise"] == pytest.approx((5 * 128 * 128 + zeros) / (ROWS * COLUMNS), abs=1e-12)
    assert row["codes_unchanged"] == 1 and row["scales_unchanged"] == pytest.approx(5 / 6)
    assert diff.coverage["base"].share == diff.coverage["tuned"].share == 1
    with RunFile(tmp_path / "run.h5") as run:
        assert run.load().tensors == diff.tensors
        mask = run.masks[f"{NAME}.weight"].dense()
    np.testing.assert_array_equal(mask, bf16(decoded(codes, scales)) != bf16(decoded(codes, other)))


def test_codes_as_they_are_stored(tmp_path: Path) -> None:
    codes, scales = fp8_blocks(weights())
    base, tuned = write_fp8(tmp_path / "base", codes, scales), write_fp8(tmp_path / "tuned", codes, 2 * scales)
    diff = ckptdiff.diff(base, tuned, values="codes")
    assert {facts.name: facts.dtype_base for facts in diff.tensors} == {
        f"{NAME}.weight": "F8_E4M3", f"{NAME}.weight_scale_inv": "F32"}  # fmt: skip
    assert any("compared as raw codes, unscaled" in warning for warning in diff.warnings)


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_bf16_checkpoint_against_its_own_fp8_copy(device: str, tmp_path: Path) -> None:
    values = weights()
    codes, scales = fp8_blocks(values)
    base = write(tmp_path / "base", {f"{NAME}.weight": tensor(values, torch.bfloat16)})
    tuned = write_fp8(tmp_path / "tuned", codes, scales)
    diff = ckptdiff.diff(base, tuned, out=tmp_path / "run.h5", mask="bitwise", device=device)
    row = only_row(diff)
    right = bf16(decoded(codes, scales))
    error = np.linalg.norm((right - values).astype(np.float64)) / np.linalg.norm(values.astype(np.float64))
    assert row["rel_norm"] == pytest.approx(error, rel=1e-9) and 0.02 < error < 0.03
    assert (row["dtype_base"], row["dtype_tuned"]) == ("BF16", "FP8")
    assert row["unchanged_bitwise"] == np.mean(right == values)
    assert row["requantised"] > 0.999 and row["codes_unchanged"] is None and row["scales_unchanged"] is None
    with RunFile(tmp_path / "run.h5") as run:
        np.testing.assert_array_equal(run.masks[f"{NAME}.weight"].dense(), right != values)


def e2m1(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.float32]:
    """Packed codes, scales of groups of 16 in e4m3, both as codes, the values, and the scale of all."""
    whole = np.float32(np.abs(values).max() / (6 * 448))
    groups = values.reshape(len(values), -1, 16)
    scales = (np.abs(groups).max(-1) / 6 / whole).astype(ml_dtypes.float8_e4m3fn)
    wide = scales.astype(np.float32)[..., None]
    codes = np.divide(groups, wide * whole, out=np.zeros_like(groups), where=wide > 0).astype(ml_dtypes.float4_e2m1fn)
    plain = codes.view(np.uint8).reshape(len(values), -1) & 15
    return plain[:, ::2] | plain[:, 1::2] << 4, scales, codes.astype(np.float32), whole


def test_nvfp4_of_two_libraries_and_a_requantised_copy(tmp_path: Path) -> None:
    values = weights()
    packed, scales, codes, whole = e2m1(values)
    grid = torch.from_numpy(scales.view(np.uint8)).view(torch.float8_e4m3fn)
    one = write(
        tmp_path / "ct",
        {
            f"{NAME}.weight_packed": torch.from_numpy(packed),
            f"{NAME}.weight_scale": grid,
            f"{NAME}.weight_global_scale": torch.tensor([1 / whole]),
        },
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}},
    )
    other = write(
        tmp_path / "mo",
        {
            f"{NAME}.weight": torch.from_numpy(packed),
            f"{NAME}.weight_scale": grid,
            f"{NAME}.weight_scale_2": torch.tensor(whole),
        },
    )
    row = only_row(ckptdiff.diff(one, other))
    assert (row["dtype_base"], row["dtype_tuned"], row["numel"]) == ("NVFP4", "NVFP4", ROWS * COLUMNS)
    assert row["unchanged_bitwise"] > 0.999  # one over a global scale is rounded
    assert row["codes_unchanged"] == row["scales_unchanged"] == 1
    plain = write(tmp_path / "plain", {f"{NAME}.weight": tensor(values, torch.bfloat16)})
    row = only_row(ckptdiff.diff(plain, other))
    right = bf16((codes * scales.astype(np.float32)[..., None] * whole).reshape(values.shape))
    error = np.linalg.norm((right - values).astype(np.float64)) / np.linalg.norm(values.astype(np.float64))
    assert row["rel_norm"] == pytest.approx(error, rel=1e-9)
    checks = ["--fail-if", "coverage.base.share<1", "--fail-if", "global.rel_norm>1e-3"]
    assert main(["diff", str(one), str(other), *checks]) == 0


@pytest.mark.parametrize("odd", [0.0, -1.0, np.nan, np.inf])
def test_scales_that_are_no_positive_numbers_are_named(odd: float, tmp_path: Path) -> None:
    codes, scales = fp8_blocks(weights())
    other = scales.copy()
    other[0, 1] = odd
    base, tuned = write_fp8(tmp_path / "base", codes, scales), write_fp8(tmp_path / "tuned", codes, other)
    diff = ckptdiff.diff(base, tuned)
    (warning,) = (text for text in diff.warnings if "some scales are" in text)
    assert str(tuned) in warning and f"{NAME}.weight_scale_inv" in warning


def test_a_scale_grid_that_does_not_fit_leaves_stored_codes(tmp_path: Path) -> None:
    codes, scales = fp8_blocks(weights())
    base, tuned = write_fp8(tmp_path / "base", codes, scales[:1]), write_fp8(tmp_path / "tuned", codes, scales[:1])
    diff = ckptdiff.diff(base, tuned)
    assert "F8_E4M3" in {facts.dtype_base for facts in diff.tensors}
    assert any("compared as stored codes" in warning and NAME in warning for warning in diff.warnings)


@pytest.mark.parametrize("rule", ["rel:0.1", "top:20", "eta:0.01", "none"])
def test_every_rule_and_more_than_a_block(rule: str, tmp_path: Path) -> None:
    values = weights(rows=3000)
    codes, scales = fp8_blocks(values)
    other = codes.view(np.uint8).copy()
    other[::7, ::3] ^= 1
    tuned = decoded(other.view(ml_dtypes.float8_e4m3fn), scales)
    folders = [
        write_fp8(tmp_path / "a", codes, scales),
        write_fp8(tmp_path / "b", other.view(ml_dtypes.float8_e4m3fn), scales),
    ]
    plain = [
        write(tmp_path / name, {f"{NAME}.weight": tensor(side, torch.float32)})
        for name, side in (("c", decoded(codes, scales)), ("d", tuned))
    ]
    found, right = (
        ckptdiff.diff(*pair, mask=rule, out=tmp_path / f"{i}.h5") for i, pair in enumerate((folders, plain))
    )
    row, expected = only_row(found), only_row(right)
    facts = ("name", "dtype_base", "dtype_tuned", "codes_unchanged", "scales_unchanged", "requantised")
    facts += ("patch_bytes", "dense_bytes")  # of what is stored, which codes alone do not tell
    assert {k: v for k, v in row.items() if k not in facts} == {k: v for k, v in expected.items() if k not in facts}
    if rule != "none":
        with RunFile(tmp_path / "0.h5") as one, RunFile(tmp_path / "1.h5") as two:
            np.testing.assert_array_equal(one.masks[f"{NAME}.weight"].dense(), two.masks[f"{NAME}.weight"].dense())
    assert row["codes_unchanged"] == pytest.approx(np.mean(other == codes.view(np.uint8)), abs=0.01)


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def as_stored(name: str, values: np.ndarray, quantised: bool) -> dict[str, torch.Tensor]:
    if not quantised:
        return {name: tensor(values, torch.bfloat16)}
    codes, scales = fp8_blocks(values)
    weight = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn)
    return {name: weight, f"{name}_scale_inv": torch.from_numpy(scales)}


def as_used(values: np.ndarray, quantised: bool) -> np.ndarray:
    return bf16(decoded(*fp8_blocks(values))) if quantised else values


@pytest.mark.parametrize("quantised", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("stores", ["base", "tuned"])
def test_a_quantised_head_or_embedding_is_decoded_where_a_tie_was_left(
    stores: str, quantised: tuple[bool, bool], tmp_path: Path
) -> None:
    embedding, head = weights(), weights(seed=5)
    tying = {"tie_word_embeddings": True, **BLOCKS}
    folders = {
        side: write(
            tmp_path / side,
            as_stored(EMBED, embedding, of_side) | (as_stored(HEAD, head, of_side) if side == stores else {}),
            BLOCKS if side == stores else tying,
        )
        for side, of_side in zip(("base", "tuned"), quantised, strict=True)
    }
    diff = ckptdiff.diff(folders["base"], folders["tuned"])
    rows = {row["name"]: row for row in document(diff)["tensors"]}
    of_head = quantised[stores == "tuned"]
    sides = as_used(head, of_head), as_used(embedding, quantised[stores == "base"])
    base, tuned = sides if stores == "base" else sides[::-1]
    assert rows[HEAD]["untied"] is True
    assert [rows[HEAD]["dtype_base"], rows[HEAD]["dtype_tuned"]] == ["FP8" if one else "BF16" for one in quantised]
    assert rows[HEAD]["unchanged_bitwise"] == np.mean(base == tuned)
    assert all(found.share == 1 for found in diff.coverage.values())
    assert not any("raw codes" in warning for warning in diff.warnings)


@pytest.mark.parametrize("quantised", [(True, False), (False, True), (True, True)])
def test_the_common_rows_of_a_grown_quantised_embedding(quantised: tuple[bool, bool], tmp_path: Path) -> None:
    small, large = weights(rows=200), weights(rows=264)
    folders = [
        write(tmp_path / side, as_stored(EMBED, values, of_side), BLOCKS)
        for side, values, of_side in zip(("base", "tuned"), (small, large), quantised, strict=True)
    ]
    diff = ckptdiff.diff(*folders, mask="bitwise", out=tmp_path / "run.h5")
    base, tuned = as_used(small, quantised[0]), as_used(large, quantised[1])[:200]
    row = only_row(diff)
    assert row["rows"] == {"compared": 200, "only_in_base": 0, "only_in_tuned": 64}
    assert row["unchanged_bitwise"] == np.mean(base == tuned)
    with RunFile(tmp_path / "run.h5") as run:
        np.testing.assert_array_equal(run.masks[EMBED].dense(), base != tuned)


def test_globs_that_match_parts_of_weights_alone_are_said(tmp_path: Path) -> None:
    codes, scales = fp8_blocks(weights())
    path = write_fp8(tmp_path / "base", codes, scales)
    diff = ckptdiff.diff(path, path, exclude=["*_scale_inv"])
    assert any("--exclude *_scale_inv matches no tensor of its own" in warning for warning in diff.warnings)


def test_infinite_scales_are_no_step(tmp_path: Path) -> None:
    codes, scales = fp8_blocks(weights())
    other = scales.copy()
    other[:] = np.inf
    base, tuned = write_fp8(tmp_path / "base", codes, scales), write_fp8(tmp_path / "tuned", codes, other)
    assert only_row(ckptdiff.diff(base, tuned))["requantised"] == 0


def test_why_nothing_could_be_decoded_is_said_where_nothing_is_left(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {f"{NAME}.weight": tensor(weights(), torch.bfloat16)})
    packed = {f"{NAME}.weight_packed": torch.zeros(ROWS, COLUMNS // 2, dtype=torch.uint8)}
    scale = {f"{NAME}.weight_scale": torch.ones(ROWS, COLUMNS // 16).to(torch.float8_e4m3fn)}
    tuned = write(tmp_path / "tuned", packed | scale)
    with pytest.raises(PairingError) as caught:
        ckptdiff.diff(base, tuned)
    assert f"{NAME}.weight_packed: it has no weight_global_scale" in str(caught.value)
