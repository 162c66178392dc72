"""Masked optimizers follow torch's own on masked coordinates and leave every bit of the others."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ckptdiff.errors import MaskError, OptionError
from ckptdiff.retrain import MaskedAdamW, MaskedSGD, PackedMask, ParameterMasks, freeze_outside, mask_gradients
from ckptdiff.retrain.support import TileSupport, support_of

SHAPE = (37, 53)
OPTIMIZERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "adamw": (MaskedAdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "adamw-plain": (
        MaskedAdamW,
        torch.optim.AdamW,
        {"lr": 1e-3, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.0},
    ),
    "sgd": (MaskedSGD, torch.optim.SGD, {"lr": 0.1}),
    "sgd-decay": (MaskedSGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "dampening": 0.2}),
    "sgd-nesterov": (MaskedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
}
either = pytest.mark.parametrize("kind", OPTIMIZERS)


def random_mask(shape: tuple[int, ...], density: float = 0.3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < density


def gradients(steps: int, shape: tuple[int, ...] = SHAPE, seed: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def parameter(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE, seed: int = 4) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def train(optimizer: torch.optim.Optimizer, moving: torch.nn.Parameter, steps: list[torch.Tensor]) -> None:
    for gradient in steps:
        moving.grad = gradient.to(moving.dtype).reshape(moving.shape)
        optimizer.step()


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().view(torch.uint8).numpy().copy()


def oracle(kind: str, start: torch.Tensor, mask: np.ndarray, steps: list[torch.Tensor]) -> torch.Tensor:
    """Torch's own optimizer with masked gradients."""
    _, theirs, options = OPTIMIZERS[kind]
    copy = torch.nn.Parameter(start.detach().clone())
    inside = torch.from_numpy(mask)
    train(theirs([copy], **options), copy, [gradient.to(start.dtype) * inside for gradient in steps])
    return copy.detach()


@either
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_coordinates_follow_torch_and_the_others_keep_every_bit(kind: str, dtype: torch.dtype) -> None:
    ours, _, options = OPTIMIZERS[kind]
    mask, moving = random_mask(SHAPE), parameter(dtype)
    start = moving.detach().clone()
    train(ours([moving], {moving: PackedMask.of(mask)}, **options), moving, gradients(30))
    expected = oracle(kind, start, mask, gradients(30))
    inside = torch.from_numpy(mask)
    torch.testing.assert_close(moving[inside], expected[inside], rtol=2e-6, atol=1e-6)
    assert not torch.equal(moving[inside], start[inside])
    assert np.array_equal(bits(moving[~inside]), bits(start[~inside]))


@either
def test_a_parameter_that_is_not_contiguous_takes_torchs_own_step_bit_for_bit(kind: str) -> None:
    ours, _, options = OPTIMIZERS[kind]
    mask = random_mask(SHAPE)
    moving = torch.nn.Parameter(torch.randn(SHAPE[::-1], generator=torch.Generator().manual_seed(4)).t())
    start = moving.detach().clone(memory_format=torch.contiguous_format)
    train(ours([moving], {moving: PackedMask.of(mask)}, **options), moving, gradients(30))
    expected = torch.where(torch.from_numpy(mask), oracle(kind, start, mask, gradients(30)), start)
    assert torch.equal(moving, expected)


@either
def test_bf16_parameters_are_rounded_float32_masters(kind: str) -> None:
    ours, _, options = OPTIMIZERS[kind]
    mask, moving = random_mask(SHAPE), parameter(torch.bfloat16)
    start = moving.detach().clone()
    optimizer = ours([moving], {moving: PackedMask.of(mask)}, **options)
    steps = [gradient.bfloat16().float() for gradient in gradients(30)]
    train(optimizer, moving, steps)
    expected = oracle(kind, start.float(), mask, steps)
    inside = torch.from_numpy(mask)
    master = optimizer.state[moving]["master"]
    torch.testing.assert_close(master, expected[inside], rtol=2e-6, atol=1e-6)
    assert torch.equal(moving[inside], master.bfloat16())
    assert np.array_equal(bits(moving[~inside]), bits(start[~inside]))


def test_bf16_parameters_stall_at_small_rates_without_masters() -> None:
    moved = []
    for fp32_master in (False, True):
        moving = parameter(torch.bfloat16)
        start = moving.detach().clone()
        masks = {moving: PackedMask.of(np.ones(SHAPE, bool))}
        optimizer = MaskedAdamW([moving], masks, lr=1e-5, weight_decay=0.0, fp32_master=fp32_master)
        train(optimizer, moving, [torch.ones(SHAPE)] * 300)
        moved.append((moving != start).float().mean().item())
        assert ("master" in optimizer.state[moving]) == fp32_master
    assert moved[0] < 0.01
    assert moved[1] > 0.3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masters_of_parameters_that_torch_steps(dtype: torch.dtype) -> None:
    mask = random_mask(SHAPE)
    moving = torch.nn.Parameter(torch.randn(SHAPE[::-1], generator=torch.Generator().manual_seed(4)).to(dtype).t())
    start = moving.detach().clone()
    optimizer = MaskedAdamW([moving], {moving: PackedMask.of(mask)}, lr=1e-2, weight_decay=0.1)
    steps = [gradient.to(dtype).float() for gradient in gradients(5)]
    train(optimizer, moving, steps)
    inside = torch.from_numpy(mask)
    expected = oracle("adamw", start.float(), mask, steps)[inside]
    assert torch.equal(optimizer.state[moving]["master"], expected)
    assert torch.equal(moving[inside], expected.to(dtype))
    assert torch.equal(moving[~inside], start[~inside])


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_master_follows_a_parameter_that_something_else_changed(contiguous: bool) -> None:
    moving = parameter(torch.bfloat16) if contiguous else torch.nn.Parameter(torch.randn(SHAPE[::-1]).bfloat16().t())
    optimizer = MaskedSGD([moving], {moving: PackedMask.of(np.ones(SHAPE, bool))}, lr=1e-3)
    train(optimizer, moving, gradients(3))
    loaded = torch.full(SHAPE, 2.0).bfloat16()
    with torch.no_grad():
        moving.copy_(loaded)
    train(optimizer, moving, [torch.zeros(SHAPE)])
    assert torch.equal(moving, loaded)


def test_many_tiles_on_many_threads_equal_one_thread() -> None:
    shape = (5 << 20,)
    mask = PackedMask.of(random_mask(shape, 0.1))
    results = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            moving = parameter(shape=shape)
            start = moving.detach().clone()
            optimizer = MaskedAdamW([moving], {moving: mask}, lr=1e-2)
            train(optimizer, moving, gradients(2, shape))
            norm = optimizer.clip_grad_norm_(1.0)
        finally:
            torch.set_num_threads(before)
        results.append((moving.detach(), norm))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    inside = torch.from_numpy(mask.dense())
    copy = torch.nn.Parameter(start[inside])
    train(torch.optim.AdamW([copy], lr=1e-2), copy, [gradient[inside] for gradient in gradients(2, shape)])
    torch.testing.assert_close(results[0][0][inside], copy.detach(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.5, 1.0])
def test_tile_positions_are_the_masked_coordinates(density: float) -> None:
    for numel in (1, 65_535, 65_537, (1 << 20) + 70_001):
        dense = random_mask((numel,), density)
        support = support_of(PackedMask.of(dense), torch.empty(numel))
        assert isinstance(support, TileSupport)
        positions, starts = support.positions.numpy().view(np.uint16), support.starts.numpy()
        tiles = np.repeat(np.arange(starts.size - 1), np.diff(starts))
        assert np.array_equal(tiles * 65_536 + positions, np.flatnonzero(dense))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "sgd-decay"])
def test_training_resumes_from_a_saved_state(kind: str, dtype: torch.dtype) -> None:
    ours, _, options = OPTIMIZERS[kind]
    mask, moving = PackedMask.of(random_mask(SHAPE)), parameter(dtype)
    frozen = parameter(dtype, seed=9)
    optimizer = ours([frozen, moving], {moving: mask}, **options)
    train(optimizer, moving, gradients(4))
    file = io.BytesIO()
    torch.save({"model": moving.detach(), "optimizer": optimizer.state_dict()}, file)
    train(optimizer, moving, gradients(4, seed=8))

    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = torch.nn.Parameter(saved["model"])
    again = ours([frozen, resumed], {resumed: mask}, **options)
    again.load_state_dict(saved["optimizer"])
    for value in again.state[resumed].values():
        assert not isinstance(value, torch.Tensor) or value.dtype == torch.float32
    train(again, resumed, gradients(4, seed=8))
    assert torch.equal(resumed, moving)
    # What was loaded is a copy: a second resume starts where the first did.
    second = torch.nn.Parameter(torch.load(io.BytesIO(file.getvalue()), weights_only=True)["model"])
    third = ours([frozen, second], {second: mask}, **options)
    third.load_state_dict(saved["optimizer"])
    train(third, second, gradients(4, seed=8))
    assert torch.equal(second, moving)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("momenta", [(0.0, 0.9), (0.9, 0.0), (0.9, 0.0, 0.9)])
def test_momentum_may_be_turned_on_and_off(momenta: tuple[float, ...], contiguous: bool) -> None:
    mask, ours = random_mask(SHAPE), parameter()
    theirs = torch.nn.Parameter(ours.detach().clone())
    if not contiguous:
        ours = torch.nn.Parameter(ours.detach().t().contiguous().t())
    masked = MaskedSGD([ours], {ours: PackedMask.of(mask)}, lr=0.1, dampening=0.4)
    plain = torch.optim.SGD([theirs], lr=0.1, dampening=0.4)
    inside = torch.from_numpy(mask)
    for seed, momentum in enumerate(momenta):
        masked.param_groups[0]["momentum"] = plain.param_groups[0]["momentum"] = momentum
        train(masked, ours, gradients(3, seed=seed))
        train(plain, theirs, [gradient * inside for gradient in gradients(3, seed=seed)])
    torch.testing.assert_close(ours[inside], theirs[inside], rtol=2e-6, atol=1e-6)


def test_a_float32_state_resumes_in_bf16_with_masters() -> None:
    mask = PackedMask.of(np.ones(SHAPE, bool))
    wide = parameter()
    before = MaskedAdamW([wide], {wide: mask}, lr=1e-5, weight_decay=0.0)
    train(before, wide, [torch.ones(SHAPE)])
    narrow = torch.nn.Parameter(wide.detach().bfloat16())
    start = narrow.detach().clone()
    after = MaskedAdamW([narrow], {narrow: mask}, lr=1e-5, weight_decay=0.0)
    after.load_state_dict(before.state_dict())
    train(after, narrow, [torch.ones(SHAPE)] * 300)
    assert (narrow != start).float().mean() > 0.3  # without masters it would stall


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_an_optimizer_can_be_copied_with_its_parameters(copied: Callable) -> None:
    moving = parameter()
    optimizer = MaskedAdamW([moving], {moving: PackedMask.of(random_mask(SHAPE))})
    train(optimizer, moving, gradients(2))
    moving.grad = None
    other, another = copied((moving, optimizer))
    train(another, other, gradients(2, seed=8))
    assert not torch.equal(other, moving)
    train(optimizer, moving, gradients(2, seed=8))
    assert torch.equal(other, moving)


def test_a_parameter_that_was_cast_later_is_refused() -> None:
    layer = torch.nn.Linear(5, 3, bias=False)
    optimizer = MaskedAdamW(layer.parameters(), {layer.weight: PackedMask.of(np.ones((3, 5), bool))})
    layer.half()
    layer.weight.grad = torch.ones(3, 5, dtype=torch.float16)
    with pytest.raises(MaskError, match="sharded after") as caught:
        optimizer.step()
    assert "float16" in str(caught.value)


@pytest.mark.parametrize("rows", [0, 50, 2000])
def test_a_parameter_of_another_size_later_is_refused(rows: int) -> None:
    """As sharding leaves it; the kernels would write beyond its end."""
    moving = torch.nn.Parameter(torch.zeros(1000, 100))
    optimizer = MaskedAdamW([moving], {moving: PackedMask.of(np.ones((1000, 100), bool))})
    moving.data = torch.zeros(rows, 100)
    moving.grad = torch.ones(rows, 100)
    for call in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0)):
        with pytest.raises(MaskError, match="sharded after") as caught:
            call()
        assert f"({rows}, 100)" in str(caught.value) and "freeze_outside" in str(caught.value)
    assert not moving.any()


def test_options_of_torchs_own_optimizers_are_refused_not_ignored() -> None:
    moving = parameter()
    masks = {moving: PackedMask.of(np.ones(SHAPE, bool))}
    for option in ("maximize", "amsgrad"):
        with pytest.raises(OptionError, match="does not have"):
            MaskedAdamW([{"params": [moving], option: True}], masks)
        MaskedAdamW([{"params": [moving], option: False}], masks)
        with pytest.raises(OptionError, match="does not have"):
            MaskedAdamW([moving], masks).load_state_dict(torch.optim.AdamW([moving], **{option: True}).state_dict())


def test_a_state_of_other_masks_or_of_another_optimizer_is_refused() -> None:
    moving = parameter()
    one, two = (MaskedAdamW([moving], {moving: PackedMask.of(random_mask(SHAPE, seed=seed))}) for seed in (1, 2))
    train(one, moving, gradients(1))
    with pytest.raises(MaskError, match="other masks"):
        two.load_state_dict(one.state_dict())
    dense = torch.optim.AdamW([moving])
    train(dense, moving, gradients(1))
    with pytest.raises(MaskError, match="without masks"):
        two.load_state_dict(dense.state_dict())
    other = MaskedSGD([moving], {moving: PackedMask.of(random_mask(SHAPE, seed=2))})
    train(other, moving, gradients(1))
    with pytest.raises(MaskError, match="another optimizer") as caught:
        two.load_state_dict(other.state_dict())
    assert "betas" in str(caught.value.found)
    with pytest.raises(MaskError, match="another optimizer"):
        other.load_state_dict(two.state_dict())
    wrong = one.state_dict()
    wrong["param_groups"][0]["betas"] = (2, 2)
    with pytest.raises(OptionError, match="out of range"):
        one.load_state_dict(wrong)


def test_messages_name_the_parameter() -> None:
    moving = parameter()
    masks = ParameterMasks({moving: PackedMask.of(np.ones(SHAPE, bool))}, {moving: "w"})
    optimizer = MaskedAdamW([moving], masks)
    moving.grad = torch.sparse_coo_tensor(size=SHAPE, check_invariants=True)
    with pytest.raises(MaskError, match="dense gradients") as caught:
        optimizer.step()
    assert caught.value.tensor == "w"
    moving.grad = None
    moving.data = torch.zeros(3, 3)
    moving.grad = torch.ones(3, 3)
    with pytest.raises(MaskError, match="sharded after") as caught:
        copy.copy(optimizer).step()
    assert caught.value.tensor == "w"
    with pytest.raises(MaskError, match="does not fit") as caught:
        MaskedAdamW([moving], masks)
    assert caught.value.tensor == "w"


@pytest.mark.parametrize("dense", [np.ones(SHAPE, bool), torch.ones(SHAPE, dtype=torch.bool)])
def test_a_mask_that_is_not_packed_is_refused(dense: object) -> None:
    moving = parameter()
    optimizer = torch.optim.SGD([moving])
    for make in (
        lambda masks: MaskedAdamW([moving], masks),
        lambda masks: ParameterMasks(masks, {moving: "w"}),
        lambda masks: freeze_outside(optimizer, masks),
        mask_gradients,
    ):
        with pytest.raises(MaskError, match="not packed") as caught:
            make({moving: dense})
        assert "PackedMask.of" in str(caught.value.hint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_that_of_masked_gradients(dtype: torch.dtype, max_norm: float) -> None:
    mask = random_mask(SHAPE)
    inside = torch.from_numpy(mask)
    ours, theirs = parameter(dtype), parameter(dtype)
    ours.grad = gradients(1)[0].to(dtype)
    theirs.grad = ours.grad * inside
    norm = MaskedAdamW([ours], {ours: PackedMask.of(mask)}).clip_grad_norm_(max_norm)
    expected = torch.nn.utils.clip_grad_norm_([theirs], max_norm)
    torch.testing.assert_close(norm.float(), expected.float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
    torch.testing.assert_close(ours.grad[inside], theirs.grad[inside])


def test_a_norm_that_is_not_finite_can_be_refused() -> None:
    moving = parameter()
    moving.grad = torch.full(SHAPE, torch.inf)
    optimizer = MaskedAdamW([moving], {moving: PackedMask.of(random_mask(SHAPE))})
    with pytest.raises(RuntimeError, match="inf"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)


def test_what_gradients_say_outside_the_mask_is_not_read() -> None:
    mask = random_mask(SHAPE)
    clean, poisoned = parameter(), parameter()
    for moving in (clean, poisoned):
        steps = gradients(3)
        if moving is poisoned:
            steps = [torch.where(torch.from_numpy(mask), gradient, torch.nan) for gradient in steps]
        optimizer = MaskedAdamW([moving], {moving: PackedMask.of(mask)})
        moving.grad = steps[0].clone()
        optimizer.clip_grad_norm_(0.1)
        train(optimizer, moving, steps)
    assert torch.equal(clean, poisoned)


@pytest.mark.parametrize(("dtype", "per_coordinate"), [(torch.float32, 12), (torch.bfloat16, 16), (torch.float64, 20)])
def test_state_takes_a_few_bytes_per_masked_coordinate(dtype: torch.dtype, per_coordinate: int) -> None:
    shape = (1000, 1000)
    mask, moving = PackedMask.of(random_mask(shape, 0.05)), parameter(dtype, shape)
    optimizer = MaskedAdamW([moving], {moving: mask})
    train(optimizer, moving, gradients(1, shape))
    assert optimizer.nbytes <= per_coordinate * mask.count
    held = sum(value.nbytes for value in optimizer.state[moving].values() if isinstance(value, torch.Tensor))
    assert held > (per_coordinate - 5) * mask.count


def test_parameters_without_mask_or_gradient_stay_and_the_rest_of_torch_works() -> None:
    moving, unmasked, empty, still = parameter(), parameter(seed=5), parameter(seed=6), parameter(seed=7)
    everything = PackedMask.of(np.ones(SHAPE, bool))
    masks = {moving: everything, empty: PackedMask.of(np.zeros(SHAPE, bool)), still: everything}
    groups = [{"params": [moving, unmasked], "lr": 0.5}, {"params": [empty, still], "weight_decay": 0.3}]
    optimizer = MaskedAdamW(groups, masks)
    starts = [p.detach().clone() for p in (moving, unmasked, empty, still)]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (moving.square().sum() + unmasked.sum() + empty.sum()) / moving.numel()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(2)]
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert losses[1] < losses[0]
    moved = [not torch.equal(p, start) for p, start in zip((moving, unmasked, empty, still), starts, strict=True)]
    assert moved == [True, False, False, False]
    assert {p for p, state in optimizer.state.items() if state} == {moving}


def test_what_cannot_be_trained_is_refused() -> None:
    moving, other = parameter(), parameter()
    nothing = PackedMask.of(np.zeros(SHAPE, bool))
    with pytest.raises(MaskError, match="nothing to train"):
        MaskedAdamW([moving], {moving: nothing})
    with pytest.raises(MaskError, match="nothing to train"):
        MaskedSGD([moving], {other: nothing.inverted()})
    with pytest.raises(MaskError, match="does not fit"):
        MaskedAdamW([moving], {moving: PackedMask.of(np.ones(SHAPE[::-1], bool))})
    optimizer = MaskedAdamW([moving], {moving: nothing.inverted()})
    with pytest.raises(MaskError, match="has no masks"):
        optimizer.add_param_group({"params": [other]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused() -> None:
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = MaskedAdamW(embedding.parameters(), {embedding.weight: PackedMask.of(np.ones((5, 3), bool))})
    embedding(torch.arange(2)).sum().backward()
    with pytest.raises(MaskError, match="dense gradients"):
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p, m: MaskedAdamW(p, m, lr=-1.0),
        lambda p, m: MaskedAdamW(p, m, betas=(0.9, 1.0)),
        lambda p, m: MaskedAdamW(p, m, eps=float("nan")),
        lambda p, m: MaskedSGD(p, m, momentum=-0.1),
        lambda p, m: MaskedSGD(p, m, nesterov=True),
        lambda p, m: MaskedAdamW([{"params": p, "lr": -1.0}], m),
        lambda p, m: MaskedAdamW([{"params": p, "betas": (2, 2)}], m),
        lambda p, m: MaskedSGD([{"params": p, "nesterov": True}], m, momentum=0.9, dampening=0.5),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable) -> None:
    moving = parameter()
    with pytest.raises(OptionError):
        make([moving], {moving: PackedMask.of(np.ones(SHAPE, bool))})
