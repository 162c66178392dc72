"""Two ranks train what one does, and no byte outside the masks moves: FSDP2, DDP, and the Trainer on both."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from sharded_training import CLIP, OPTIONS, Uneven, load, loss_of, save, sharded, train, train_by_trainer
from small_model import checkpoint, dense_by_h5py
from torch.distributed.fsdp import fully_shard

import ckptdiff
from ckptdiff.errors import MaskError
from ckptdiff.retrain import MaskedAdamW, MaskedSGD, freeze_outside, load_masks

pytestmark = pytest.mark.slow

BITS = {torch.float32: torch.int32, torch.int64: torch.int64}
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of the model, of whose coordinates about a third moved, and its scale."""
    folder = tmp_path_factory.mktemp("sharded")
    moved = Uneven()
    torch.nn.init.constant_(moved.scale, 2.0)
    base, tuned = checkpoint(folder / "base", Uneven()), checkpoint(folder / "tuned", moved, moved=0.3)
    ckptdiff.diff(base, tuned, out=folder / "run.h5", mask="bitwise")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """An own folder, with that run."""
    (tmp_path / "run.h5").symlink_to(made / "run.h5")
    return tmp_path


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def assert_frozen(after: State, before: State, run_file: Path) -> None:
    """Every bit outside the masks is there, and most coordinates inside moved."""
    inside = moved = 0
    assert after.keys() == before.keys()
    for name, start in before.items():
        mask = torch.from_numpy(dense_by_h5py(run_file, name))
        differs = after[name].view(BITS[start.dtype]) != start.view(BITS[start.dtype])
        assert not (differs & ~mask).any(), name
        inside += int(mask.sum())
        moved += int((differs & mask).sum())
    assert moved > 0.9 * inside > 100


def reference(run_file: Path, steps: range) -> State:
    """The same training on one rank, written by hand."""
    model = Uneven()
    masks = {p: torch.from_numpy(dense_by_h5py(run_file, name)) for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, 0, 1).backward()
        for parameter, mask in masks.items():
            parameter.grad *= mask
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        before = {parameter: parameter.detach().clone() for parameter in masks}
        optimizer.step()
        for parameter, mask in masks.items():
            parameter.data[~mask] = before[parameter][~mask]
    return model.state_dict()


def assert_close(found: State, expected: State) -> None:
    """AdamW turns a difference in the last place of a gradient near zero into one of a share of a step."""
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=2e-4)


def test_a_fully_sharded_model(folder: Path) -> None:
    on_ranks(2, "sharded_training:train_sharded", folder)
    base = Uneven().state_dict()
    for name in ("float32", "bfloat16"):
        assert_frozen(load_file(folder / f"{name}.safetensors"), base, folder / "run.h5")
    assert_close(load_file(folder / "float32.safetensors"), reference(folder / "run.h5", range(4)))
    sides = (load_file(folder / f"{name}.safetensors") for name in ("sgd", "before-sgd"))
    assert_frozen(*sides, folder / "run.h5")


def test_a_sharded_training_goes_on_with_another_number_of_ranks(folder: Path) -> None:
    expected, base = reference(folder / "run.h5", range(4)), Uneven().state_dict()
    model = Uneven()
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
    with freeze_outside(optimizer, load_masks(folder / "run.h5", model)):
        train(model, optimizer, range(2))
    save(model, optimizer, folder / "of-one")
    on_ranks(2, "sharded_training:resume_sharded", folder)
    found = load_file(folder / "one-then-two.safetensors")
    assert_close(found, expected)
    assert_frozen(found, base, folder / "run.h5")
    model = Uneven()
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
    load(model, optimizer, folder / "of-two")
    with freeze_outside(optimizer, load_masks(folder / "run.h5", model)):
        train(model, optimizer, range(2, 4))
    assert_close(model.state_dict(), expected)
    assert_frozen(model.state_dict(), base, folder / "run.h5")


def test_replicas(folder: Path) -> None:
    on_ranks(2, "sharded_training:train_replicas", folder)
    base = Uneven().state_dict()
    for name in ("adamw", "masked-adamw", "masked-sgd"):
        first, second = (load_file(folder / f"{name}-{rank}.safetensors") for rank in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert_frozen(first, base, folder / "run.h5")
        if name != "masked-sgd":
            assert_close(first, reference(folder / "run.h5", range(4)))
        # One rank goes on where two were.
        model = Uneven()
        masks = load_masks(folder / "run.h5", model)
        values, state = torch.load(folder / f"{name}-half.pt")
        model.load_state_dict(values)
        if name == "adamw":
            optimizer = torch.optim.AdamW(model.parameters())
            freeze_outside(optimizer, masks)
        else:
            optimizer = {"masked-adamw": MaskedAdamW, "masked-sgd": MaskedSGD}[name](model.parameters(), masks)
        optimizer.load_state_dict(state)
        train(model, optimizer, range(2, 4))
        assert_close(model.state_dict(), first)
        assert_frozen(model.state_dict(), base, folder / "run.h5")


def test_the_trainer_on_two_ranks_and_then_on_one(folder: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    on_ranks(2, "sharded_training:train_by_trainer", folder)
    base = Uneven().state_dict()
    train_by_trainer(folder, resumed=True)
    states = []
    for step in (2, 4):
        stored = load_file(folder / f"trainer/checkpoint-{step}/model.safetensors")
        states.append({name.removeprefix("model."): values for name, values in stored.items()})
        assert_frozen(states[-1], base, folder / "run.h5")
    assert not torch.equal(states[0]["lm_head.weight"], states[1]["lm_head.weight"])


@pytest.mark.parametrize("ours", [MaskedAdamW, MaskedSGD])
def test_masked_optimizers_refuse_sharded_parameters(ours: type, folder: Path, process_group: None) -> None:
    model = sharded()
    with pytest.raises(MaskError, match="takes no sharded parameters") as caught:
        ours(model.parameters(), load_masks(folder / "run.h5", model))
    assert caught.value.tensor == "scale"
    assert "freeze_outside(torch.optim" in caught.value.hint
    other = Uneven()
    early = load_masks(folder / "run.h5", other)
    with pytest.raises(MaskError, match="takes no sharded parameters"):
        ours(model.parameters(), early)
    # Those of an optimizer that is there already are replaced, as accelerate does.
    optimizer = ours(other.parameters(), early)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    loss_of(model, 0, 0, 1).backward()
    before = [parameter.full_tensor().detach().clone() for parameter in model.parameters()]
    for act in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0)):
        with pytest.raises(MaskError, match="takes no sharded parameters"):
            act()
    assert all(torch.equal(p.full_tensor(), start) for p, start in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("parts", ["all", "layers"])
def test_masks_that_were_loaded_before_the_model_was_sharded_are_refused(
    parts: str, folder: Path, process_group: None
) -> None:
    model = Uneven()
    early = load_masks(folder / "run.h5", model)
    before_it = torch.optim.SGD(model.parameters())
    frozen = freeze_outside(before_it, early)
    for module in model.layers:
        fully_shard(module)
    if parts == "all":
        fully_shard(model)
    with pytest.raises(MaskError, match="before the model was sharded") as caught:
        freeze_outside(torch.optim.SGD(model.parameters()), early)
    assert "after fully_shard" in caught.value.hint
    before_it.param_groups[0]["params"] = list(model.parameters())
    loss_of(model, 0, 0, 1).backward()
    with pytest.raises(MaskError, match="before the model was sharded") as caught:
        before_it.step()
    assert caught.value.tensor in early.names.values()
    frozen.remove()
    late = load_masks(folder / "run.h5", model)
    start = [whole(parameter) for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    freeze_outside(optimizer, late)
    optimizer.step()
    for parameter, values in zip(model.parameters(), start, strict=True):
        moved = (whole(parameter) != values).numpy()
        assert not moved[~late[parameter].dense()].any() and np.count_nonzero(moved) > 0.8 * late[parameter].count


def test_the_loop_of_the_documentation(folder: Path, process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs/retraining.md").read_text()
    (block,) = (text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "fully_shard" in text)
    model, before = Uneven(), Uneven().state_dict()
    monkeypatch.chdir(folder)
    names = {"torch": torch, "model": model, "fully_shard": fully_shard}
    exec(compile("from ckptdiff.retrain import freeze_outside, load_masks\n" + block, "retraining.md", "exec"), names)
    train(model, names["optimizer"], range(2))
    after = {name: values.full_tensor() for name, values in model.named_parameters()}
    assert_frozen({**before, **after}, before, folder / "run.h5")


def whole(parameter: torch.Tensor) -> torch.Tensor:
    values = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return values.detach().clone()
