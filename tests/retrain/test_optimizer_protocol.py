"""Masked optimizers do what torch's own do with whatever torch does to an optimizer: here each does it to both."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ckptdiff.errors import MaskError
from ckptdiff.retrain import MaskedAdamW, MaskedSGD, PackedMask

KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "adamw": (MaskedAdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "sgd": (MaskedSGD, torch.optim.SGD, {"lr": 1e-1, "momentum": 0.9, "weight_decay": 0.1}),
}
each = pytest.mark.parametrize("kind", KINDS)


def layers(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5)).to(dtype)
    model[2].weight.data = model[2].weight.data.t().contiguous().t()  # torch steps this one, kernels the others
    return model


def everything(parameters: Any) -> dict[Any, PackedMask]:
    return {p: PackedMask.of(np.ones(p.shape, bool)) for p in parameters}


def pairs(kind: str, **more: Any) -> Iterator[tuple[torch.nn.Module, torch.optim.Optimizer]]:
    """Ours with masks of all coordinates, then torch's own, of equal models."""
    ours, theirs, options = KINDS[kind]
    for optimizer in (ours, theirs):
        model = layers()
        masks = [everything(model.parameters())] if optimizer is ours else []
        yield model, optimizer(model.parameters(), *masks, **copy.deepcopy({**options, **more}))


def loss_of(model: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(6, n, generator=generator).to(dtype) for n in (7, 5))
    return (model(x) - y).square().mean()


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seeds: range = range(3)) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()


def values(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_alike(kind: str, scenario: Callable[[torch.nn.Module, torch.optim.Optimizer], Any], **more: Any) -> Any:
    """What a scenario returns is equal of both, and so are parameters, but for rounding; returns it."""
    (log, ours), (expected, theirs) = (
        (scenario(model, optimizer), values(model)) for model, optimizer in pairs(kind, **more)
    )
    assert log == expected
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6)
    return log


@each
def test_hooks_of_every_kind_run_in_the_order_of_torchs(kind: str) -> None:
    def scenario(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
        log: list[str] = []

        def say(word: str) -> Callable[..., None]:
            return lambda *given: log.append(f"{word} {len(given)}")

        handles = [
            optimizer.register_step_pre_hook(say("before")),
            optimizer.register_step_post_hook(say("after")),
            register_optimizer_step_pre_hook(say("before any")),
            register_optimizer_step_post_hook(say("after any")),
            optimizer.register_state_dict_pre_hook(say("saving")),
            optimizer.register_state_dict_post_hook(say("saved")),
            optimizer.register_load_state_dict_pre_hook(say("loading")),
            optimizer.register_load_state_dict_pre_hook(say("loading first"), prepend=True),
            optimizer.register_load_state_dict_post_hook(say("loaded")),
            optimizer.register_load_state_dict_post_hook(say("loaded first"), prepend=True),
        ]
        for _ in range(2):
            steps(model, optimizer, range(1))
            optimizer.load_state_dict(optimizer.state_dict())
        for handle in handles:
            handle.remove()
        steps(model, optimizer, range(1))
        return log

    assert len(assert_alike(kind, scenario)) == 20


@each
def test_hooks_may_change_what_they_are_given(kind: str) -> None:
    def scenario(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
        steps(model, optimizer)
        optimizer.register_state_dict_post_hook(lambda _, state: {**state, "more": 5})
        saved = optimizer.state_dict()

        def halved(_: object, state: dict[str, Any]) -> dict[str, Any]:
            return {**state, "param_groups": [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]}

        def cleared(given: torch.optim.Optimizer) -> None:
            for state in given.state.values():
                for value in state.values():
                    if isinstance(value, torch.Tensor) and value.ndim:
                        value.zero_()

        optimizer.register_load_state_dict_pre_hook(halved)
        optimizer.register_load_state_dict_post_hook(cleared)
        optimizer.load_state_dict(saved)
        with optimizer.register_step_pre_hook(lambda own, *_: ((own, lambda: torch.tensor(3.0)), {})):
            loss = optimizer.step()
        steps(model, optimizer)
        return [saved["more"], optimizer.param_groups[0]["lr"], float(loss)]

    assert_alike(kind, scenario)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hooks_after_loading_see_the_state_that_is_stepped_with(kind: str, dtype: torch.dtype) -> None:
    ours, _, options = KINDS[kind]
    model = layers(dtype)
    optimizer = ours(model.parameters(), everything(model.parameters()), **options)
    steps(model, optimizer)
    seen: list[torch.dtype] = []

    def look(given: torch.optim.Optimizer) -> None:
        for state in given.state.values():
            seen.extend(value.dtype for value in state.values() if isinstance(value, torch.Tensor))
            state["step"].fill_(7)

    optimizer.register_load_state_dict_post_hook(look)
    optimizer.load_state_dict(optimizer.state_dict())
    assert set(seen) == {torch.float32}
    steps(model, optimizer, range(1))
    assert {int(state["step"]) for state in optimizer.state.values()} == {8}


@each
@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(kind: str, to_none: bool) -> None:
    def scenario(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[bool]:
        loss_of(model).backward()
        optimizer.zero_grad(set_to_none=to_none)
        found = [p.grad is None or not p.grad.any() for p in model.parameters()]
        optimizer.step()  # of gradients of zero: weight decay alone, and none without gradients
        return [*found, *(p.grad is None for p in model.parameters())]

    assert_alike(kind, scenario)


@each
def test_closures(kind: str) -> None:
    def scenario(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
        log: list[Any] = []

        def closure() -> torch.Tensor:
            log.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        with torch.no_grad():
            first = optimizer.step(closure)
        second = optimizer.step(closure=closure)
        return [*log, first.requires_grad, round(first.item(), 4), round(second.item(), 4), optimizer.step()]

    assert_alike(kind, scenario)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "steps": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda i: 1 / (i + 1)),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, step_size_up=2),
    "in turn": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.3, total_iters=4), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
    "averaging": lambda o: swa_utils.SWALR(o, 0.5, anneal_epochs=3),
}


@each
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tensor", [False, True])
def test_schedules(kind: str, schedule: str, tensor: bool) -> None:
    """They change rates and momenta of groups, and find again what they wrote there."""

    def scenario(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
        schedule_of = SCHEDULES[schedule](optimizer)
        log = []
        for seed in range(6):
            steps(model, optimizer, range(seed, seed + 1))
            schedule_of.step()
            (group,) = optimizer.param_groups
            log.append((float(group["lr"]), group.get("betas"), group.get("momentum")))
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return log

    lr = KINDS[kind][2]["lr"]
    log = assert_alike(kind, scenario, lr=torch.tensor(lr) if tensor else lr)
    assert len({row[0] for row in log}) > 1


@each
def test_plateaus(kind: str) -> None:
    def scenario(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
        schedule = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        for loss in (1.0, 2.0, 3.0):
            steps(model, optimizer, range(1))
            schedule.step(loss)
        return optimizer.param_groups[0]["lr"]

    assert assert_alike(kind, scenario) < KINDS[kind][2]["lr"]


def through_torch(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": through_torch,
}


@each
@pytest.mark.parametrize("copied", COPIES)
def test_copies_go_on_by_themselves(kind: str, copied: str) -> None:
    def scenario(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[bool]:
        calls: list[object] = []
        steps(model, optimizer)
        model.zero_grad()
        before = values(model)
        alone = COPIES[copied](optimizer)  # with parameters of its own
        for parameter in alone.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        alone.step()
        other, again = COPIES[copied]((model, optimizer))
        again.register_step_pre_hook(lambda *_: calls.append(None))
        steps(other, again, range(3, 6))
        log = [torch.equal(values(model), before), len(calls) == 3]
        steps(model, optimizer, range(3, 6))
        log += [torch.equal(values(other), values(model)), len(calls) == 3]
        optimizer.__setstate__(optimizer.__getstate__())
        steps(model, optimizer, range(1))
        return log

    assert all(assert_alike(kind, scenario))


@each
def test_groups_that_come_later(kind: str) -> None:
    masked, _, options = KINDS[kind]

    def scenario(model: torch.nn.Module, _: torch.optim.Optimizer) -> list[Any]:
        early, late = list(model[0].named_parameters()), list(model[2].named_parameters())
        ours = type(_) is masked
        optimizer = masked(early, everything(model.parameters()), **options) if ours else type(_)(early, **options)
        steps(model, optimizer)
        more = {"masks": everything(model.parameters())} if ours else {}
        given = {"params": late, "lr": 0.5, **more}
        optimizer.add_param_group(given)
        steps(model, optimizer)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        steps(model, optimizer)
        return [{k: v for k, v in g.items() if k in ("lr", "param_names")} for g in optimizer.param_groups]

    log = assert_alike(kind, scenario)
    assert log[1] == {"lr": 0.5, "param_names": ["weight", "bias"]}


@each
def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was(kind: str) -> None:
    ours, _, options = KINDS[kind]
    model = layers()
    optimizer = ours(model[0].parameters(), everything(model[0].parameters()), **options)
    for masks in (None, {model[2].bias: PackedMask.of(np.ones(3, bool))}):
        group = {"params": [("out.bias", model[2].bias)][:1] if masks is None else [model[2].bias]}
        with pytest.raises((MaskError, ValueError)):
            optimizer.add_param_group(group if masks is None else {**group, "masks": masks})
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [model[2].bias], "masks": {}})
    before = model[2].bias.detach().clone()
    steps(model, optimizer)
    assert torch.equal(model[2].bias, before)


FORMS = {
    "plain": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "whole": StateDictOptions(full_state_dict=True, cpu_offload=True),
}


def partly(kind: str, dtype: torch.dtype) -> tuple[torch.nn.Module, Any]:
    """A model of which one parameter has no mask, and another a part of one."""
    ours, _, options = KINDS[kind]
    model = layers(dtype)
    masks = everything(model.parameters())
    del masks[model[0].bias]
    masks[model[0].weight] = PackedMask.of(np.random.default_rng(1).random((9, 7)) < 0.4)
    return model, ours(model.parameters(), masks, **options)


@each
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distributed_checkpoints(kind: str, form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, optimizer = partly(kind, dtype)
    start = values(model)
    get_optimizer_state_dict(model, optimizer, options=FORMS[form])  # makes a step of zero gradients
    assert torch.equal(values(model), start)
    steps(model, optimizer)
    saved = get_optimizer_state_dict(model, optimizer, options=FORMS[form])
    middle = copy.deepcopy(model.state_dict())
    save({"optimizer": saved}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    steps(model, optimizer, range(3, 6))
    expected = values(model)

    other, again = partly(kind, dtype)
    for _ in range(2):
        other.load_state_dict(middle)
        found = {"optimizer": get_optimizer_state_dict(other, again, options=FORMS[form])}
        load(found, storage_reader=FileSystemReader(tmp_path), no_dist=True)
        set_optimizer_state_dict(other, again, found["optimizer"], options=FORMS[form])
        steps(other, again, range(3, 6))
        assert torch.equal(values(other), expected)


@each
def test_a_gradient_scaler_skips_and_unscales(kind: str) -> None:
    def scenario(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        log: list[Any] = []
        for seed in range(6):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, seed)).backward()
            if seed == 2:
                next(model.parameters()).grad[0, 0] = torch.inf
            before = values(model)
            if seed % 2:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            log.append((scaler.get_scale(), torch.equal(values(model), before)))
        return log

    log = assert_alike(kind, scenario)
    assert [same for _, same in log] == [False, False, True, False, False, False]


@each
def test_a_backward_pass_through_old_values_is_refused(kind: str) -> None:
    ours, _, options = KINDS[kind]
    weight = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = ours([weight], everything([weight]), **options)
    loss = weight.square().sum()
    weight.grad = torch.ones(3, 4)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
