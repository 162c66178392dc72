"""A training that is resumed goes on as if nothing had ended it: by hand, with accelerate, and with the Trainer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckptdiff.errors import MaskError, OptionError
from ckptdiff.retrain import MaskedAdamW, MaskedSGD, PackedMask, freeze_outside, load_masks

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (MaskedAdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "sgd": (MaskedSGD, {"lr": 1e-1, "momentum": 0.9, "dampening": 0.2}),
}
each = pytest.mark.parametrize("kind", OPTIMIZERS)
TOKENS = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) * 2 + i} for i in range(12)]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def all_bits(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Every bit of the parameters, and of what the optimizer knows of them."""
    states = optimizer.state_dict()["state"]
    known = [{k: bits(v) if isinstance(v, torch.Tensor) else v for k, v in states[key].items()} for key in states]
    return [*map(bits, model.parameters()), *known]


def parameter(dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(37, 53, generator=torch.Generator().manual_seed(4)).to(dtype))


def train(optimizer: torch.optim.Optimizer, moving: torch.nn.Parameter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        moving.grad = torch.randn(moving.shape, generator=generator).to(moving.dtype)
        optimizer.step()
    moving.grad = None


MASK = PackedMask.of(np.random.default_rng(0).random((37, 53)) < 0.3)
COPIES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda pair: pair,
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copied", COPIES)
def test_a_state_is_loaded_any_number_of_times(kind: str, dtype: torch.dtype, copied: str) -> None:
    ours, options = OPTIMIZERS[kind]
    moving = parameter(dtype)
    optimizer = ours([moving], {moving: MASK}, **options)
    train(optimizer, moving, 1)
    start, saved = moving.detach().clone(), copy.deepcopy(optimizer.state_dict())
    train(optimizer, moving, 2)
    expected = moving.detach().clone()
    for _ in range(3):
        other, again = COPIES[copied]((moving, optimizer))
        again.load_state_dict(saved)
        with torch.no_grad():
            other.copy_(start)
        train(again, other, 2)
        assert torch.equal(other, expected) and not torch.equal(other, start)
        assert again.state_dict()["state"][0].keys() == saved["state"][0].keys()
        again.load_state_dict(again.state_dict())
        with pytest.raises(MaskError, match="has no masks"):
            again.add_param_group({"params": [parameter()]})


@each
def test_the_state_of_another_optimizer_is_refused_at_any_time(kind: str) -> None:
    ours, options = OPTIMIZERS[kind]
    moving = parameter()
    optimizer = ours([moving], {moving: MASK}, **options)
    (theirs,) = (row[0] for row in OPTIMIZERS.values() if row[0] is not ours)
    lacking = {"adamw": ("betas, eps", "betas"), "sgd": ("dampening, momentum, nesterov",) * 2}[kind]
    others = theirs([moving], {moving: MASK}), torch.optim.Adagrad([moving])
    train(optimizer, moving, 1)
    own = optimizer.state_dict()
    for _ in range(2):
        for other, lacks in zip(others, lacking, strict=True):
            with pytest.raises(MaskError, match="belongs to another optimizer") as caught:
                optimizer.load_state_dict(other.state_dict())
            assert caught.value.found == f"none of {lacks}"
            assert caught.value.expected == f"groups of {ours.__name__}, with {', '.join(sorted(ours.options))}"
        # Loading makes torch add this to the optimizer's defaults: that does not make it an option.
        wrong = copy.deepcopy(own)
        wrong["param_groups"][0]["differentiable"] = True
        with pytest.raises(OptionError, match="does not have"):
            optimizer.load_state_dict(wrong)
        optimizer.load_state_dict(own)


@each
def test_options_are_those_of_the_constructor(kind: str) -> None:
    ours, options = OPTIMIZERS[kind]
    moving = parameter()
    optimizer = ours([moving], {moving: MASK}, **options)
    assert set(optimizer.param_groups[0]) == {"params", *ours.options}


@each
def test_states_saved_by_other_versions_of_torch_and_beside_schedulers(kind: str) -> None:
    """Groups have what torch, or a scheduler, added to them, or have not."""
    ours, options = OPTIMIZERS[kind]
    moving = parameter()
    optimizer = ours([moving], {moving: MASK}, **options)
    train(optimizer, moving, 1)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=9, cycle_momentum=kind == "adamw")
    state = optimizer.state_dict()
    for more in ({}, {"differentiable": False}, {"foreach": None, "maximize": False, "capturable": False}):
        saved = {**state, "param_groups": [{**state["param_groups"][0], **more}]}
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["max_lr"] == 1.0


def test_hooks_of_torch_may_adapt_a_state() -> None:
    moving = parameter(torch.bfloat16)
    optimizer = MaskedAdamW([moving], {moving: MASK})
    train(optimizer, moving, 1)
    saved = optimizer.state_dict()
    older = {**saved, "state": {0: {f"old.{name}": value for name, value in saved["state"][0].items()}}}
    with pytest.raises(MaskError, match="without masks"):
        optimizer.load_state_dict(older)

    def renamed(_: object, state: dict[str, Any]) -> dict[str, Any]:
        (slots,) = state["state"].values()
        return {**state, "state": {0: {name.removeprefix("old."): value for name, value in slots.items()}}}

    other = copy.deepcopy(moving)
    again = MaskedAdamW([other], {other: MASK})
    again.register_load_state_dict_pre_hook(renamed)
    again.load_state_dict(older)
    for either, own in ((optimizer, moving), (again, other)):
        train(either, own, 2)
    assert torch.equal(other, moving)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accelerate_prepares_saves_and_loads(
    kind: str, dtype: torch.dtype, run_file: Path, make_task: Callable, tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    ours, options = OPTIMIZERS[kind]

    def prepared() -> tuple[Any, torch.nn.Module, Any, Any]:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = make_task().to(dtype)
        optimizer = ours(model.parameters(), load_masks(run_file, model), **options)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=9)
        return accelerator, *accelerator.prepare(model, optimizer, schedule)

    def steps(accelerator: Any, model: torch.nn.Module, optimizer: Any, schedule: Any, examples: Iterator[Any]) -> None:
        for example in examples:
            with accelerator.accumulate(model):
                accelerator.backward(model(**{key: value[None] for key, value in example.items()})["loss"])
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    first = prepared()
    steps(*first, iter(TOKENS[:6]))
    first[0].save_state(str(tmp_path))
    steps(*first, iter(TOKENS[6:]))
    second = prepared()
    for _ in range(2):
        second[0].load_state(str(tmp_path))
        steps(*second, iter(TOKENS[6:]))
        assert all_bits(*second[1:3]) == all_bits(*first[1:3])


@pytest.mark.parametrize("kind", [*OPTIMIZERS, "freeze_outside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loop_with_a_schedule_resumes(
    kind: str, dtype: torch.dtype, run_file: Path, make_task: Callable, tmp_path: Path
) -> None:
    def made() -> tuple[torch.nn.Module, Any, Any]:
        model = make_task().to(dtype)
        masks = load_masks(run_file, model)
        if kind == "freeze_outside":
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
            freeze_outside(optimizer, masks)
        else:
            ours, options = OPTIMIZERS[kind]
            optimizer = ours(model.parameters(), masks, **options)
        return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=13)

    def steps(model: torch.nn.Module, optimizer: Any, schedule: Any, examples: list[Any]) -> None:
        for example in examples:
            optimizer.zero_grad()
            model(**{key: value[None] for key, value in example.items()})["loss"].backward()
            optimizer.step()
            schedule.step()

    first = made()
    steps(*first, TOKENS[:6])
    torch.save([part.state_dict() for part in first], tmp_path / "middle")
    steps(*first, TOKENS[6:])
    second = made()
    for _ in range(2):
        for part, state in zip(second, torch.load(tmp_path / "middle"), strict=True):
            part.load_state_dict(state)
        steps(*second, TOKENS[6:])
        assert all_bits(*second[:2]) == all_bits(*first[:2])


@pytest.mark.parametrize("kind", [*OPTIMIZERS, "callback"])
def test_the_trainer_resumes(kind: str, run_file: Path, make_task: Callable, tmp_path: Path) -> None:
    """As masked optimizers, and torch's own under the callback."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path,
        per_device_train_batch_size=2,
        num_train_epochs=2,
        learning_rate=1e-2,
        report_to="none",
        save_steps=4,
        use_cpu=True,
        disable_tqdm=True,
    )

    def trainer() -> Any:
        task = make_task()
        if kind == "callback":
            from ckptdiff.retrain import MaskCallback

            return transformers.Trainer(task, arguments, train_dataset=TOKENS, callbacks=[MaskCallback(run_file)])
        ours, options = OPTIMIZERS[kind]
        optimizer = ours(task.parameters(), load_masks(run_file, task), **options)
        return transformers.Trainer(task, arguments, train_dataset=TOKENS, optimizers=(optimizer, None))

    whole, resumed = trainer(), trainer()
    before = list(map(bits, whole.model.parameters()))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == whole.state.global_step == 12
    assert all_bits(resumed.model, resumed.optimizer) == all_bits(whole.model, whole.optimizer)
    assert list(map(bits, whole.model.parameters())) != before
