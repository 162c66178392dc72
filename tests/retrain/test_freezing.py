"""Under any torch optimizer, frozen coordinates keep every bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ckptdiff.errors import MaskError
from ckptdiff.retrain import MaskedAdamW, PackedMask, freeze_outside, load_masks, mask_gradients

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, weight_decay=0.5),
    "lbfgs": lambda p: torch.optim.LBFGS(list(p), max_iter=4),
}
TOKENS = torch.arange(24).reshape(4, 6)


def loss_of(model: torch.nn.Module, shift: int = 0) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), (TOKENS.flatten() * 5 + shift) % 24)


def values(model: torch.nn.Module) -> list[np.ndarray]:
    return [parameter.detach().numpy().copy() for parameter in model.parameters()]


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int = 5, clip: float | None = None) -> None:
    for shift in range(count):

        def closure(shift: int = shift) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, shift)
            loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_frozen_coordinates_keep_every_bit(kind: str, run_file: Path, make_model: Callable) -> None:
    model = make_model()
    masks = load_masks(run_file, model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    steps(model, optimizer, 2)  # what the optimizer remembers of an unmasked past must not matter
    before = values(model)
    with freeze_outside(optimizer, masks):
        steps(model, optimizer)
    moved = 0
    for parameter, start in zip(model.parameters(), before, strict=True):
        inside = masks[parameter].dense()
        after = parameter.detach().numpy()
        assert np.array_equal(after[~inside].view(np.uint32), start[~inside].view(np.uint32))
        moved += np.count_nonzero(after[inside] != start[inside])
    assert moved > 0.5 * masks.count
    steps(model, optimizer, 1)  # the hooks are gone
    assert any(
        (now != start)[~masks[p].dense()].any()
        for p, now, start in zip(model.parameters(), values(model), before, strict=True)
    )


def test_the_trajectory_is_that_of_the_masked_optimizer_clipping_included(run_file: Path, make_model: Callable) -> None:
    frozen, masked = make_model(), make_model()
    optimizer = torch.optim.AdamW(frozen.parameters(), lr=1e-3, weight_decay=0.1)
    freeze_outside(optimizer, load_masks(run_file, frozen))
    steps(frozen, optimizer, clip=0.1)
    ours = MaskedAdamW(masked.parameters(), load_masks(run_file, masked), lr=1e-3, weight_decay=0.1)
    for shift in range(5):
        ours.zero_grad()
        loss_of(masked, shift).backward()
        ours.clip_grad_norm_(0.1)
        ours.step()
    for ours_now, theirs in zip(masked.parameters(), frozen.parameters(), strict=True):
        torch.testing.assert_close(ours_now, theirs, rtol=1e-5, atol=1e-6)


def test_masked_gradients_are_zero_outside_even_where_they_were_nan(run_file: Path, make_model: Callable) -> None:
    model = make_model()
    masks = load_masks(run_file, model)
    hooks = mask_gradients(masks)
    (loss_of(model) * torch.nan).backward()
    for parameter, mask in masks.items():
        assert (parameter.grad.numpy()[~mask.dense()] == 0).all()
        assert np.isnan(parameter.grad.numpy()[mask.dense()]).all()
    hooks.remove()
    hooks.remove()
    model.zero_grad()
    loss_of(model).backward()
    assert any((parameter.grad.numpy()[~mask.dense()] != 0).any() for parameter, mask in masks.items())


def test_parameters_without_a_mask_are_frozen_whole(run_file: Path, make_model: Callable) -> None:
    model = make_model()
    masks = load_masks(run_file, model).only("*.up_proj.weight")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    with freeze_outside(optimizer, masks):
        loss_of(model).backward()
        assert model.norm.weight.grad.abs().max() == 0
        optimizer.step()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == set(masks.names.values())


@pytest.mark.parametrize("kind", ["adamw", "sgd", "lbfgs"])
def test_a_closure_moves_no_parameter_without_a_mask(kind: str, run_file: Path, make_model: Callable) -> None:
    """It brings gradients of zero back during the step: weight decay, momentum and curvature would use them."""
    model = make_model()
    masks = load_masks(run_file, model).only("*.up_proj.weight")
    optimizer = OPTIMIZERS[kind](model.parameters())
    steps(model, optimizer, 2)
    before = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    with freeze_outside(optimizer, masks):
        steps(model, optimizer, 3)
    assert {p for p, start in before.items() if not torch.equal(p, start)} == set(masks)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_parameters(run_file: Path, make_model: Callable, process_group: None) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = make_model()
    before = values(model)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    masks = load_masks(run_file, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    with freeze_outside(optimizer, masks):
        steps(model, optimizer, 2)
    for parameter, start in zip(model.parameters(), before, strict=True):
        after = parameter.full_tensor().detach().numpy()
        inside = masks[parameter].dense()
        assert np.array_equal(after[~inside], start[~inside])
        assert (after[inside] != start[inside]).any()


def test_nothing_to_train_is_refused(make_model: Callable) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    with pytest.raises(MaskError, match="nothing to train"):
        freeze_outside(optimizer, {parameter: PackedMask.of(np.zeros(3, bool))})
    with pytest.raises(MaskError, match="does not fit"):
        freeze_outside(optimizer, {parameter: PackedMask.of(np.ones(4, bool))})


def test_parameters_that_come_later_are_frozen_too(run_file: Path, make_model: Callable) -> None:
    model = make_model()
    masks = load_masks(run_file, model).only("layers.*")
    early, late = list(model.layers[0].parameters()), [*model.layers[1].parameters(), *model.norm.parameters()]
    optimizer = torch.optim.SGD(early, lr=0.1, weight_decay=0.5)
    before = {parameter: parameter.detach().clone() for parameter in (*early, *late)}
    with freeze_outside(optimizer, masks):
        steps(model, optimizer, 1)
        optimizer.add_param_group({"params": late})
        steps(model, optimizer, 3)
    for parameter, start in before.items():
        moved = (parameter != start).numpy()
        if parameter in masks:
            assert not moved[~masks[parameter].dense()].any() and moved.any()
        else:
            assert not moved.any()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in before)


def test_sparse_gradients_are_refused() -> None:
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    masks = {embedding.weight: PackedMask.of(np.ones((5, 3), bool))}
    with freeze_outside(torch.optim.SGD(embedding.parameters()), masks), pytest.raises(MaskError, match="dense"):
        embedding(torch.arange(2)).sum().backward()
