"""What the ranks of test_sharded.py do, in a module that they can import."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from small_model import Model, Task
from torch import distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ckptdiff.retrain import MaskedAdamW, MaskedSGD, freeze_outside, load_masks

CLIP, PARTS = 0.5, 2
OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.5}


class Uneven(Model):
    """Of no size that two ranks could share evenly; of one parameter the second rank has nothing."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(width=15)
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.scale


def loss_of(model: torch.nn.Module, step: int, first: int, every: int) -> torch.Tensor:
    """Of one in so many of a step's eight sequences."""
    tokens = ((torch.arange(48).reshape(8, 6) * 7 + step) % 24)[first::every]
    return torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), (tokens.flatten() * 5 + step) % 24)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Gradients are accumulated over two passes, and clipped; ranks share the sequences."""
    rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    for step in steps:
        optimizer.zero_grad()
        for part in range(PARTS):
            with until_the_last(model, part + 1 == PARTS):
                (loss_of(model, step, rank * PARTS + part, ranks * PARTS) / PARTS).backward()
        if isinstance(optimizer, MaskedAdamW | MaskedSGD):
            optimizer.clip_grad_norm_(CLIP)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()


def until_the_last(model: torch.nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Let gradients stay with their rank."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def save(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Model and optimizer, of which every rank writes what it has."""
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=folder)


def load(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """What any number of ranks saved."""
    model_state, state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=state)


def gather(model: torch.nn.Module, target: Path) -> None:
    """The whole model, as rank 0 writes it."""
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if distributed.get_rank() == 0:
        save_file(whole, target)


def sharded(policy: MixedPrecisionPolicy | None = None) -> torch.nn.Module:
    """As FSDP2 has it: a group for each layer, and one for the rest."""
    model = Uneven()
    for module in (*model.layers, model):
        fully_shard(module, mp_policy=policy or MixedPrecisionPolicy())
    return model


def train_sharded(folder: Path) -> None:
    """In float32, and with products in bfloat16; SGD too, whose momentum comes from before."""
    for name, policy in (("float32", None), ("bfloat16", MixedPrecisionPolicy(param_dtype=torch.bfloat16))):
        model = sharded(policy)
        optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
        with freeze_outside(optimizer, load_masks(folder / "run.h5", model)):
            train(model, optimizer, range(4))
        gather(model, folder / f"{name}.safetensors")
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1, momentum=0.9, weight_decay=0.5)
    train(model, optimizer, range(1))
    gather(model, folder / "before-sgd.safetensors")
    freeze_outside(optimizer, load_masks(folder / "run.h5", model))
    train(model, optimizer, range(1, 3))
    gather(model, folder / "sgd.safetensors")


def resume_sharded(folder: Path) -> None:
    """Save half of a training for one rank, and go on where one rank saved."""
    model = sharded()
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
    freeze_outside(optimizer, load_masks(folder / "run.h5", model))
    train(model, optimizer, range(2))
    save(model, optimizer, folder / "of-two")
    model = sharded()
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
    load(model, optimizer, folder / "of-one")
    freeze_outside(optimizer, load_masks(folder / "run.h5", model))
    train(model, optimizer, range(2, 4))
    gather(model, folder / "one-then-two.safetensors")


def train_replicas(folder: Path) -> None:
    """By each optimizer, as DDP has it; every rank writes what it has in the end."""
    for name in ("adamw", "masked-adamw", "masked-sgd"):
        model = DistributedDataParallel(Uneven())
        masks = load_masks(folder / "run.h5", model)
        if name == "adamw":
            optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
            freeze_outside(optimizer, masks)
        elif name == "masked-adamw":
            optimizer = MaskedAdamW(model.parameters(), masks, **OPTIONS)
        else:
            optimizer = MaskedSGD(model.parameters(), masks, momentum=0.9, **OPTIONS)
        train(model, optimizer, range(2))
        if distributed.get_rank() == 0:
            torch.save((model.module.state_dict(), optimizer.state_dict()), folder / f"{name}-half.pt")
        train(model, optimizer, range(2, 4))
        save_file(model.module.state_dict(), folder / f"{name}-{distributed.get_rank()}.safetensors")


def train_by_trainer(folder: Path, resumed: bool = False) -> None:
    """As transformers' Trainer does it on so many ranks as there are."""
    from transformers import Trainer, TrainingArguments

    from ckptdiff.retrain import MaskCallback

    tokens = [{"input_ids": (torch.arange(6) + i) % 24, "labels": (torch.arange(6) * 2 + i) % 24} for i in range(16)]
    arguments = TrainingArguments(
        output_dir=folder / "trainer",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4 if resumed else 2,
        save_steps=2,
        learning_rate=1e-2,
        weight_decay=0.5,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    task, callback = Task(Uneven()), MaskCallback(folder / "run.h5")
    trainer = Trainer(task, arguments, train_dataset=tokens, callbacks=[callback])
    if distributed.is_initialized():
        assert isinstance(trainer.accelerator.prepare(Task(Uneven())), DistributedDataParallel)
    trainer.train(resume_from_checkpoint=resumed)
