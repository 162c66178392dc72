"""The three ways to train a student: on-policy distillation, fine-tuning on the teacher's samples, and REINFORCE."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from model import Model
from settings import Scale
from task import accuracy, answer, problems
from torch import Tensor
from torch.nn import functional

METHODS = ("opd", "sft", "rlvr")
"""OPD: the student samples, and each token's reverse KL to the teacher is minimised (S1). SFT: cross-entropy on what
the teacher samples. RLVR: REINFORCE on exact match, with the batch's mean as the baseline."""


def pretrain(scale: Scale, width: int, seed: int, until: float, every: int) -> tuple[Model, float]:
    """Train from scratch on right answers until an accuracy is reached, looked at every so many steps."""
    model = Model(width, scale.layers, scale.digits, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=scale.pretrain_lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
    generator = torch.Generator().manual_seed(seed)
    reached = 0.0
    for step in range(1, scale.pretrain_steps + 1):
        prompts, answers = problems(scale.batch, scale.digits, generator)
        loss = cross_entropy(model, prompts, answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % every == 0:
            reached = accuracy(model, scale.digits, 400)
            if reached >= until:
                break
    return model, reached


def cross_entropy(model: Model, prompts: Tensor, answers: Tensor) -> Tensor:
    """Mean over the tokens of the answer."""
    return functional.cross_entropy(answer_logits(model, prompts, answers).flatten(0, 1), answers.flatten())


def answer_logits(model: Model, prompts: Tensor, answers: Tensor) -> Tensor:
    """Logits that predict each token of the answer, shape (batch, tokens, vocabulary)."""
    tokens = torch.cat([prompts, answers[:, :-1]], 1)
    return model(tokens)[:, prompts.shape[1] - 1 :]


def loss_of(
    method: str, student: Model, teacher: Model, prompts: Tensor, right: Tensor, noise: torch.Generator
) -> Tensor:
    """Loss of one batch."""
    length = right.shape[1]
    if method == "sft":
        return cross_entropy(student, prompts, answer(teacher, prompts, length, noise))
    sampled = answer(student, prompts, length, noise)
    log_p = answer_logits(student, prompts, sampled).log_softmax(-1)
    if method == "rlvr":
        reward = (sampled == right).all(1).float()
        chosen = log_p.gather(-1, sampled[..., None]).squeeze(-1).sum(1)
        return -((reward - reward.mean()) * chosen).mean()
    with torch.no_grad():
        log_q = answer_logits(teacher, prompts, sampled).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def train(
    method: str,
    base: Model,
    teacher: Model,
    scale: Scale,
    make_optimizer: Callable[[Model], torch.optim.Optimizer],
    *,
    steps: int,
    seed: int,
) -> Iterator[tuple[int, Model]]:
    """Train a copy of the base; yields (step, student) after each step, the student being one and the same object.

    Gradients are clipped to norm 1: over masked coordinates, if the optimizer has masks.
    """
    student = copy.deepcopy(base)
    optimizer = make_optimizer(student)
    noise = torch.Generator().manual_seed(1000 + seed)
    for step in range(1, steps + 1):
        prompts, right = problems(scale.batch, scale.digits, noise)
        loss = loss_of(method, student, teacher, prompts, right, noise)
        optimizer.zero_grad()
        loss.backward()
        if hasattr(optimizer, "clip_grad_norm_"):
            optimizer.clip_grad_norm_(1.0)
        else:
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        yield step, student
