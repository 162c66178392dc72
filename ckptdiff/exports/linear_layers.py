"""Tell the weights of linear layers, which PEFT adapts, from other tensors, as far as names and shapes say."""

from __future__ import annotations

from collections.abc import Sequence

_TRANSPOSED = ("c_attn", "c_proj", "c_fc")
_EMBEDDINGS = ("embed", "wte", "wpe")


def refusal(name: str, shape: Sequence[int], floating: bool) -> str | None:
    """Why an adapter of linear layers cannot hold the update of a tensor; None if it can."""
    module = name.removesuffix(".weight")
    if not floating:
        return "no floating values"
    if len(shape) < 2:
        return "a bias" if name.endswith("bias") else "a vector"
    if len(shape) > 2:
        return "not a matrix"
    if not min(shape):
        return "no values"
    if module == name:
        return "not the weight of a module"
    last = module.rpartition(".")[2]
    if any(part in last.lower() for part in _EMBEDDINGS):
        return "an embedding"
    if last in _TRANSPOSED:
        return "stored transposed (Conv1D)"
    return None
