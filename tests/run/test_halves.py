"""Gate and up that lie in another order than their layout says are said, by what their values tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import ckptdiff
from ckptdiff.cli import main

BF16 = ml_dtypes.bfloat16
EXPERTS, INNER, HIDDEN = 4, 48, 40
INSIDE = "model.layers.0.mlp.experts"
Tensors = dict[str, np.ndarray]
Parts = tuple[np.ndarray, np.ndarray]


def split(gate: np.ndarray, up: np.ndarray) -> Tensors:
    return {
        f"{INSIDE}.{expert}.{part}_proj.weight": stack[expert]
        for part, stack in (("gate", gate), ("up", up))
        for expert in range(EXPERTS)
    }


def fused(gate: np.ndarray, up: np.ndarray) -> Tensors:
    return {f"{INSIDE}.gate_up_proj": np.concatenate([gate, up], 1)}


def transposed(gate: np.ndarray, up: np.ndarray) -> Tensors:
    return {f"{INSIDE}.gate_up_proj": np.concatenate([gate, up], 1).swapaxes(1, 2)}


def in_turns(gate: np.ndarray, up: np.ndarray) -> Tensors:
    return {f"{INSIDE}.gate_up_proj": np.stack([gate, up], 2).reshape(EXPERTS, -1, HIDDEN)}


def dense(gate: np.ndarray, up: np.ndarray) -> Tensors:
    return {"model.layers.0.mlp.gate_up_proj.weight": np.concatenate([gate[0], up[0]])}


def dense_split(gate: np.ndarray, up: np.ndarray) -> Tensors:
    return {f"model.layers.0.mlp.{part}_proj.weight": one[0] for part, one in (("gate", gate), ("up", up))}


def drawn(seed: int) -> Parts:
    rng = np.random.default_rng(seed)
    return tuple((0.02 * rng.standard_normal((EXPERTS, INNER, HIDDEN))).astype(BF16) for _ in range(2))


def trained(parts: Parts, by: float = 0.3) -> Parts:
    """After a long training: hardly a value is what it was."""
    rng = np.random.default_rng(7)
    return tuple((one + by * 0.02 * rng.standard_normal(one.shape)).astype(BF16) for one in parts)


def said(folder: Path, base: Tensors, tuned: Tensors) -> list[str]:
    for name, side in (("base", base), ("tuned", tuned)):
        save_file({key: np.ascontiguousarray(array) for key, array in side.items()}, folder / f"{name}.safetensors")
    diff = ckptdiff.diff(folder / "base.safetensors", folder / "tuned.safetensors")
    assert [coverage.share for coverage in diff.coverage.values()] == [1, 1]
    return [warning for warning in diff.warnings if "gate and up" in warning]


FORMS = [(split, fused), (split, transposed), (fused, transposed), (dense, dense_split), (fused, fused), (dense, dense)]


@pytest.mark.parametrize(("one", "other"), [*FORMS, *((other, one) for one, other in FORMS[:4])])
def test_swapped_halves(one: Callable[..., Tensors], other: Callable[..., Tensors], tmp_path: Path) -> None:
    gate, up = drawn(0)
    found = said(tmp_path, one(gate, up), other(*trained((up, gate))))
    assert {warning.partition(": ")[2].partition(",")[0] for warning in found} == {"gate and up look swapped in tuned"}
    assert found[0].startswith(f"{next(iter(one(gate, up)))}: ")
    # One for each kind of tensor, not for each tensor.
    assert len(found) == 1 + ("gate_proj" in found[0].partition(":")[0])


@pytest.mark.parametrize(
    ("one", "other", "where"),
    [
        (split, in_turns, "in turns in tuned"),
        (in_turns, split, "in turns in base"),
        (fused, in_turns, "in turns in tuned"),
    ],
)
def test_halves_in_turns(
    one: Callable[..., Tensors], other: Callable[..., Tensors], where: str, tmp_path: Path
) -> None:
    found = said(tmp_path, one(*drawn(0)), other(*trained(drawn(0))))
    assert found and all(f": gate and up look {where}, " in warning for warning in found)


@pytest.mark.parametrize(("one", "other"), [*FORMS, *((other, one) for one, other in FORMS[:4])])
def test_weights_that_merely_differ(one: Callable[..., Tensors], other: Callable[..., Tensors], tmp_path: Path) -> None:
    for tuned in (drawn(0), trained(drawn(0), 1.5), drawn(1)):
        assert said(tmp_path, one(*drawn(0)), other(*tuned)) == []
    nothing = tuple(np.zeros_like(part) for part in drawn(0))
    assert said(tmp_path, one(*nothing), other(*drawn(0))) == []


@pytest.mark.parametrize("quantised", ["base", "tuned"])
def test_swapped_halves_of_a_quantised_side(quantised: str, tmp_path: Path) -> None:
    gate, up = drawn(0)
    name, codes = f"{INSIDE}.gate_up_proj", fused(up, gate)[f"{INSIDE}.gate_up_proj"].astype(np.float32) * 1000
    fp8 = {name: codes.astype(ml_dtypes.float8_e4m3fn), f"{name}_scale": np.full((EXPERTS, 1, 1), 1e-3, np.float32)}
    sides = (fp8, split(gate, up)) if quantised == "base" else (split(gate, up), fp8)
    found = said(tmp_path, *sides)
    assert found and all("look swapped in tuned" in warning for warning in found)


def test_no_data_is_read_for_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate, up = drawn(0)
    said(tmp_path, split(gate, up), fused(up, gate))
    paths = [str(tmp_path / f"{side}.safetensors") for side in ("base", "tuned")]
    assert main(["diff", *paths, "--dry-run"]) == 0
    assert "look swapped" not in "".join(capsys.readouterr())
    assert main(["diff", *paths]) == 0
    assert "gate and up look swapped in tuned" in "".join(capsys.readouterr())
