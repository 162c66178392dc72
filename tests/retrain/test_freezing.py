"""Under any torch optimizer, frozen coordinates keep every bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckptdiff.errors import MaskError
from ckptdiff.retrain import MaskedAdamW, PackedMask, ParameterMasks, freeze_outside, load_masks, mask_gradients
from ckptdiff.retrain.kernels.outside import UNIT

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


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128]
SIZES = st.sampled_from([1, 2, 63, 64, 65, 255, 256, 257, 1000, 5000])


def codes(tensor: torch.Tensor) -> np.ndarray:
    """Bytes of each coordinate, row by row."""
    return tensor.detach().contiguous().view(-1, 1).view(torch.uint8).numpy().copy()


def any_bits(numel: int, dtype: torch.dtype, rng: np.random.Generator) -> torch.Tensor:
    """All codes that there are, NaN with payloads, infinities and negative zeros among them."""
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.from_numpy(rng.integers(0, 256, numel * size, np.uint8)).view(dtype)


class Scramble(torch.optim.Optimizer):
    """Writes other bits everywhere in each parameter, and remembers the gradients it was given."""

    def __init__(self, params: object, seed: int, replaces: bool = False) -> None:
        super().__init__(params, {})
        self.rng, self.replaces, self.seen = np.random.default_rng(seed), replaces, []

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                self.seen.append(parameter.grad.clone())
                new = any_bits(parameter.numel(), parameter.dtype, self.rng).view(parameter.shape)
                if self.replaces:
                    parameter.data = new
                else:
                    flat(parameter).copy_(flat(new))


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, so that copies keep the payloads of NaN."""
    return tensor.detach().view({2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64))


@settings(max_examples=40, deadline=None)
@example(torch.float32, 2 * UNIT + 300, 0.3, False, 0)
@example(torch.bfloat16, UNIT + 1, 0.3, True, 0)
@given(st.sampled_from(DTYPES), SIZES, st.sampled_from([0.0, 0.01, 0.3, 0.99, 1.0]), st.booleans(), st.integers(0, 99))
def test_every_bit_outside_is_put_back_and_none_inside(
    dtype: torch.dtype, numel: int, density: float, replaces: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    inside = rng.random(numel) < density
    inside[rng.integers(numel)] = True
    moving = torch.nn.Parameter(any_bits(numel, dtype, rng))
    optimizer = Scramble([moving], seed, replaces)
    oracle = Scramble([torch.nn.Parameter(moving.detach().clone())], seed, replaces)
    (other,) = oracle.param_groups[0]["params"]
    with freeze_outside(optimizer, {moving: PackedMask.of(inside)}):
        for turn in range(3):
            if turn == 2:  # someone else writes, where no version is counted
                moving.data.copy_(torch.zeros(numel, dtype=dtype))
            start = codes(moving)
            moving.grad, other.grad = (any_bits(numel, dtype, np.random.default_rng(turn)) for _ in "ab")
            optimizer.step()
            oracle.step()
            expected = np.where(inside[:, None], codes(other), start)
            assert np.array_equal(codes(moving), expected)
            assert np.array_equal(codes(optimizer.seen[-1]), np.where(inside[:, None], codes(oracle.seen[-1]), 0))


@pytest.mark.parametrize("change", ["negated", "swapped", "one"])
def test_what_others_change_between_steps_stays(change: str) -> None:
    """By a checksum it is found; signs are the uppermost bits, and two of them cancel in many a sum."""
    moving = torch.nn.Parameter(torch.arange(1.0, 4097.0))
    inside = np.arange(4096) % 7 == 0
    optimizer = torch.optim.SGD([moving], lr=0.1, weight_decay=0.5)
    outside = torch.from_numpy(~inside)
    with freeze_outside(optimizer, {moving: PackedMask.of(inside)}):
        for _ in range(2):
            moving.grad = torch.ones(4096)
            optimizer.step()
            if change == "negated":
                moving.data.neg_()
            elif change == "swapped":
                moving.data[[1, 65]] = moving.data[[65, 1]].clone()
            else:
                moving.data[4095] = 0.0
            expected = moving.detach().clone()
            moving.grad = torch.ones(4096)
            optimizer.step()
            assert torch.equal(moving[outside], expected[outside]) and not torch.equal(moving, expected)


@pytest.mark.parametrize("ends", ["remove", "step"])
def test_a_step_that_fails_moves_nothing_outside(ends: str) -> None:
    class Fails(torch.optim.SGD):
        def step(self, closure: Callable | None = None) -> None:
            super().step(closure)
            if self.param_groups[0]["lr"] == 0.25:
                raise KeyboardInterrupt

    moving, inside = torch.nn.Parameter(torch.ones(100)), np.arange(100) < 30
    optimizer = Fails([moving], lr=0.25, weight_decay=0.5)
    freezing = freeze_outside(optimizer, {moving: PackedMask.of(inside)})
    moving.grad = torch.ones(100)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    if ends == "step":
        optimizer.param_groups[0]["lr"] = 0.125
        optimizer.step()
    else:
        freezing.remove()
    assert (moving[30:] == 1).all() and (moving[:30] < 0.7).all()


def test_a_mask_that_changes_after_the_first_step_is_refused() -> None:
    moving = torch.nn.Parameter(torch.ones(3, 4))
    mask = PackedMask.of(np.eye(3, 4, dtype=bool))
    with pytest.raises(ValueError, match="read-only"):
        mask.bits[0] = 255
    masks = {moving: mask}
    optimizer = torch.optim.SGD([moving], lr=0.1)
    freezing = freeze_outside(optimizer, masks)
    moving.grad = torch.ones(3, 4)
    optimizer.step()
    before = moving.detach().clone()
    masks[moving] = mask.inverted()
    with pytest.raises(MaskError, match="another one") as caught:
        optimizer.step()
    assert "freeze_outside" in str(caught.value) and torch.equal(moving, before)
    freezing.remove()
    with freeze_outside(optimizer, masks):
        moving.grad = torch.ones(3, 4)
        optimizer.step()
    assert (moving != before).numpy().tolist() == mask.inverted().dense().tolist()


def test_a_parameter_of_another_size_later_is_refused() -> None:
    moving = torch.nn.Parameter(torch.ones(1000, 100))
    masks = ParameterMasks({moving: PackedMask.of(np.eye(1000, 100, dtype=bool))}, {moving: "w"})
    optimizer = torch.optim.SGD([moving], lr=0.1)
    with freeze_outside(optimizer, masks):
        moving.data = torch.ones(10, 100)
        moving.grad = torch.ones(10, 100)
        with pytest.raises(MaskError, match="does not fit") as caught:
            optimizer.step()
    assert caught.value.tensor == "w" and (moving == 1).all()


def test_parameters_that_take_the_place_of_all_masked_ones_are_refused() -> None:
    """As a wrapper that shards them leaves an optimizer: to freeze all of them would be no training."""
    moving = torch.nn.Parameter(torch.ones(5))
    optimizer = torch.optim.SGD([moving], lr=0.1)
    with freeze_outside(optimizer, {moving: PackedMask.of(np.ones(5, bool))}):
        optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.ones(5))
        with pytest.raises(MaskError, match="nothing to train"):
            optimizer.step()


def test_a_step_that_is_refused_puts_nothing_back() -> None:
    """Nothing has been kept yet."""
    first, second = (torch.nn.Parameter(torch.ones(3, 4)) for _ in "ab")
    mask = PackedMask.of(np.eye(3, 4, dtype=bool))
    optimizer = torch.optim.SGD([first, second], lr=0.1, weight_decay=0.5)
    with freeze_outside(optimizer, {first: mask, second: mask}):
        first.grad, second.data = torch.ones(3, 4), torch.ones(2, 4)
        with pytest.raises(MaskError, match="does not fit"):
            optimizer.step()
        assert (first == 1).all()
    assert (first == 1).all()
