"""Train the coordinates that an update changed, and nothing else.

    python examples/retrain.py

The model is the small one of fixtures/addition, which adds numbers of two digits. The masks are the 20 % of each of its
tensors that on-policy distillation moved most; every other coordinate still has its bits at the end. Needs torch and
safetensors.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import ckptdiff
from ckptdiff.retrain import MaskedAdamW, ParameterMasks, load_masks

PAIR = Path(__file__).parents[1] / "fixtures/addition"
WIDTH, HIDDEN, LAYERS, HEADS, DIGITS = 48, 120, 3, 4, 2
PLUS, EQUALS, TOKENS = 10, 11, 12


class Layer(nn.Module):
    """Attention and a gated feed-forward part, with the names of a Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(WIDTH)
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH, bias=False) for name in names})
        self.post_attention_layernorm = nn.RMSNorm(WIDTH)
        self.mlp = nn.ModuleDict({name: nn.Linear(WIDTH, HIDDEN, bias=False) for name in ("gate_proj", "up_proj")})
        self.mlp["down_proj"] = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Both parts, each added to what comes in."""
        part, y = self.self_attn, self.input_layernorm(x)
        q, k, v = (part[name](y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + part["o_proj"](mixed.transpose(1, 2).flatten(2))
        part, y = self.mlp, self.post_attention_layernorm(x)
        return x + part["down_proj"](functional.silu(part["gate_proj"](y)) * part["up_proj"](y))


class Model(nn.Module):
    """Tokens (batch, length) to logits (batch, length, tokens)."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(TOKENS, WIDTH),
                "embed_positions": nn.Embedding(3 * DIGITS + 3, WIDTH),
                "layers": nn.ModuleList(Layer() for _ in range(LAYERS)),
                "norm": nn.RMSNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, TOKENS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of every next token."""
        part = self.model
        x = part["embed_tokens"](tokens) + part["embed_positions"].weight[: tokens.shape[1]]
        for layer in part["layers"]:
            x = layer(x)
        return self.lm_head(part["norm"](x))


def problems(count: int, seed: int) -> Tensor:
    """Problems and answers: `12+34=640`, the answer's least digit first."""
    a, b = torch.randint(10**DIGITS, (2, count, 1), generator=torch.Generator().manual_seed(seed))
    plus, equals = torch.full((count, 1), PLUS), torch.full((count, 1), EQUALS)
    places = 10 ** torch.arange(DIGITS - 1, -1, -1)
    answers = (a + b) // 10 ** torch.arange(DIGITS + 1) % 10
    return torch.cat([a // places % 10, plus, b // places % 10, equals, answers], 1)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross entropy of the answers."""
    logits = model(tokens[:, :-1])[:, -(DIGITS + 1) :]
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, -(DIGITS + 1) :].flatten())


def retrain(model: nn.Module, masks: ParameterMasks, steps: int) -> None:
    """The loop."""
    optimizer = MaskedAdamW(model.parameters(), masks, lr=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, problems(256, seed=step)).backward()
        optimizer.clip_grad_norm_(1.0)  # of the masked gradients
        optimizer.step()


def main() -> None:
    """Compare, load the masks, train, and look at what moved."""
    torch.manual_seed(0)
    model = Model()
    base = {
        name: tensor.float() for path in PAIR.glob("base/*.safetensors") for name, tensor in load_file(path).items()
    }
    model.load_state_dict(base)

    with tempfile.TemporaryDirectory() as folder:
        ckptdiff.diff(PAIR / "base", PAIR / "tuned", out=f"{folder}/run.h5", mask="top:20")
        masks = load_masks(f"{folder}/run.h5", model)
    print(f"{masks.count:,} coordinates to train, {masks.density:.1%} of the model")

    held_out = problems(1000, seed=10_000)
    before = loss_of(model, held_out).item()
    retrain(model, masks, steps=30)
    print(f"loss {before:.3f} -> {loss_of(model, held_out).item():.3f}")

    inside = outside = 0
    for name, parameter in model.named_parameters():
        moved = parameter.detach() != base[name]
        masked = torch.from_numpy(masks[parameter].dense())
        inside += int((moved & masked).sum())
        outside += int((moved & ~masked).sum())
    print(f"{inside:,} of them moved, and {outside} others")


if __name__ == "__main__":
    main()
