"""Patches of what torch saved: tensors that lie in slices are read, and files that no patch can make again refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptdiff import patch
from ckptdiff.errors import CheckpointError

State = dict[str, torch.Tensor]


@pytest.fixture
def states(tmp_path: Path) -> tuple[State, State]:
    """Both sides as torch saves them, a matrix transposed, and as safetensors."""
    random = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(300, 50, generator=random), "v": torch.randn(7, generator=random).bfloat16()}
    base["x"] = torch.randn(20, 9, generator=random)
    tuned = {name: values * 1.5 for name, values in base.items()}
    for name, state in (("base", base), ("tuned", tuned)):
        save_file(state, tmp_path / f"{name}.safetensors")
        torch.save(
            {key: one.t().contiguous().t() if one.ndim == 2 else one for key, one in state.items()},
            tmp_path / f"{name}.bin",
        )
    return base, tuned


@pytest.mark.parametrize(("make", "target"), [(patch.make_directory, "d"), (patch.make_flat, "d.safetensors")])
def test_engines_get_what_torch_saved(
    make: Callable[..., patch.Shipped], target: str, states: tuple[State, State], tmp_path: Path
) -> None:
    made = make(tmp_path / "base.bin", tmp_path / "tuned.bin", tmp_path / target)
    assert made.changed == sum(one.numel() for one in states[0].values())
    patch.apply(tmp_path / "base.safetensors", [tmp_path / target], tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[name], values) for name, values in states[1].items())
    with pytest.raises(CheckpointError, match="only safetensors files"):
        patch.apply(tmp_path / "base.bin", [tmp_path / target], tmp_path / "no.safetensors")


def test_a_base_that_torch_saved(states: tuple[State, State], tmp_path: Path) -> None:
    for base in ("base.bin", "base.safetensors"):
        patch.make(tmp_path / base, tmp_path / "tuned.safetensors", tmp_path / f"{base}.d")
        for other in ("base.bin", "base.safetensors"):
            patch.apply(tmp_path / other, [tmp_path / f"{base}.d"], tmp_path / f"{base}-{other}.safetensors")
            made = (tmp_path / f"{base}-{other}.safetensors").read_bytes()
            assert made == (tmp_path / "tuned.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="only safetensors files"):
        patch.make(tmp_path / "base.bin", tmp_path / "tuned.bin", tmp_path / "no.d")
    assert not (tmp_path / "no.d").exists()
