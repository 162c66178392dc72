"""What a patch changes, as arrays and in a live model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from stored_tensors import BITS, random_tensor, read, write
from test_apply_shipped import KINDS, OWN, make
from test_delta_directory import refused, run_of

from ckptdiff import patch
from ckptdiff.errors import OptionError

TORCH = {"BF16": torch.bfloat16, "I64": torch.int64, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {
        name: torch.frombuffer(bytearray(one.data) or bytearray(1), dtype=torch.uint8)[: len(one.data)]
        .clone()
        .view(TORCH[one.dtype])
        .view(one.shape)
        for name, one in read(checkpoint).items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(
        torch.equal(one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8))
        for name in other
    )


@pytest.mark.parametrize("kind", [*KINDS, OWN])
@pytest.mark.parametrize("with_base", [True, False])
def test_setting_what_open_yields_makes_the_tuned_side(kind: str, with_base: bool, tmp_path: Path) -> None:
    steps = run_of(tmp_path, 1)
    link = make(kind, *steps, tmp_path / "patch")
    if not with_base and kind != "flat":
        refused(lambda: list(patch.open(link)), "the base", kind=OptionError)
        return
    held, tuned = read(steps[0]), read(steps[1])
    data = {name: np.frombuffer(one.data, f"u{BITS[one.dtype] // 8}").copy() for name, one in held.items()}
    seen: dict[str, int] = {}
    for change in patch.open(link, steps[0] if with_base else None):
        assert (change.dtype, change.shape) == held[change.name][:2]
        before = data[change.name][change.indices]
        assert np.all(before != change.values) or change.name == "ids"  # whole numbers are sent whole in flat
        assert np.all(np.diff(change.indices) > 0) and change.indices.size <= 1 << 20
        data[change.name][change.indices] = change.values
        assert change.indices[0] > seen.get(change.name, -1)
        seen[change.name] = int(change.indices[-1])
    assert {name: values.tobytes() for name, values in data.items()} == {name: one.data for name, one in tuned.items()}
    assert seen.keys() == {name for name in tuned if tuned[name] != held[name]}


def test_open_of_a_patch_of_another_base(tmp_path: Path) -> None:
    steps = run_of(tmp_path, 2)
    for kind in (*KINDS, OWN):
        link = make(kind, steps[0], steps[1], tmp_path / kind)
        refused(lambda link=link: list(patch.open(link, steps[2])), "base")


@pytest.mark.parametrize("kind", [*KINDS, OWN])
def test_a_live_model(kind: str, tmp_path: Path) -> None:
    steps = run_of(tmp_path, 2)
    links = [make(kind, steps[k], steps[k + 1], tmp_path / f"patch-{k}", k + 1) for k in range(2)]
    state = state_of(steps[0])
    state["a buffer"] = torch.arange(4)
    places = {name: one.data_ptr() for name, one in state.items()}
    changed = patch.apply_to(state, links, threads=3)
    assert same(state, state_of(steps[2])) and torch.equal(state["a buffer"], torch.arange(4))
    assert places == {name: one.data_ptr() for name, one in state.items()}
    assert changed == sum(one != read(steps[0])[name] for name, one in read(steps[2]).items())
    for wrong in (links[:1], links[1:], links[::-1]):
        if kind == "overwrite" and wrong == links[1:]:
            continue  # may be applied again
        before = {name: one.clone() for name, one in state.items()}
        refused(lambda wrong=wrong: patch.apply_to(state, wrong))
        assert same(state, before)


def test_two_names_of_one_tensor_and_parameters_that_require_a_gradient(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    one, other = (random_tensor(rng, "BF16", (6, 4)) for _ in range(2))
    base, tuned = (write(tmp_path / f"{k}.safetensors", {"a": t, "b": t}) for k, t in enumerate((one, other)))
    link = make("xor", base, tuned, tmp_path / "patch")
    state = state_of(base)
    state["a"] = state["b"] = torch.nn.Parameter(state["a"])
    assert patch.apply_to(state, [link]) == 2
    assert same({name: tensor.detach() for name, tensor in state.items()}, state_of(tuned))
    state["a"] = state["a"].detach().t()
    refused(lambda: patch.apply_to(state, [link]), "contiguous", kind=OptionError)
    refused(lambda: patch.apply_to(state, []), "no patch", kind=OptionError)


def test_what_a_live_model_cannot_take(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    a, b = random_tensor(rng, "F32", (5,)), random_tensor(rng, "F32", (3,))
    states = {"less": {"a": a}, "both": {"a": a, "b": b}}
    files = {name: write(tmp_path / f"{name}.safetensors", held) for name, held in states.items()}
    for old, new in (("less", "both"), ("both", "less")):
        patch.make(files[old], files[new], tmp_path / f"{old}.d")
        refused(
            lambda old=old: patch.apply_to(state_of(files[old]), [tmp_path / f"{old}.d"]), "other values", "tensor:   b"
        )
