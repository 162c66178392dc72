"""Addition as a language: `123+456=` is answered `9750`, least significant digit first."""

from __future__ import annotations

import torch
from torch import Tensor

PLUS, EQUALS = 10, 11
VOCABULARY = 12


def problems(count: int, digits: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random prompts, shape (count, 2 * digits + 2), and their right answers, shape (count, digits + 1)."""
    a, b = torch.randint(10**digits, (2, count), generator=generator)
    places = 10 ** torch.arange(digits - 1, -1, -1)
    plus, equals = torch.full((count, 1), PLUS), torch.full((count, 1), EQUALS)
    prompts = torch.cat([a[:, None] // places % 10, plus, b[:, None] // places % 10, equals], 1)
    answers = (a + b)[:, None] // 10 ** torch.arange(digits + 1) % 10
    return prompts, answers


@torch.no_grad()
def answer(model: torch.nn.Module, prompts: Tensor, length: int, generator: torch.Generator | None = None) -> Tensor:
    """Tokens that a model appends: sampled from its distribution, or without a generator the likeliest."""
    tokens = prompts
    for _ in range(length):
        logits = model(tokens)[:, -1]
        if generator is None:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, chosen], 1)
    return tokens[:, prompts.shape[1] :]


def accuracy(model: torch.nn.Module, digits: int, count: int = 1000, seed: int = 12345) -> float:
    """Share of problems answered right in every digit; always the same problems."""
    prompts, answers = problems(count, digits, torch.Generator().manual_seed(seed))
    return (answer(model, prompts, digits + 1) == answers).all(1).float().mean().item()
