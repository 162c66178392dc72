"""Which tensors an adapter can express."""

from __future__ import annotations

from ckptdiff.checkpoint import Kind, TensorPair

__all__ = ["refusal"]

_TRANSPOSED = ("c_attn", "c_proj", "c_fc")
_EMBEDDINGS = ("embed", "wte", "wpe")


def refusal(pair: TensorPair) -> str | None:
    """Why a low-rank adapter of linear layers cannot hold the update of a tensor; None if it can.

    Parameters
    ----------
    pair : TensorPair
    """
    shape, module = pair.base.shape, pair.name.removesuffix(".weight")
    if pair.base.kind is not Kind.FLOAT:
        return "no floating values"
    if len(shape) < 2:
        return "a bias" if pair.name.endswith("bias") else "a vector"
    if len(shape) > 2:
        return "not a matrix"
    if not min(shape):
        return "no values"
    if module == pair.name:
        return "not the weight of a module"
    last = module.rpartition(".")[2]
    if any(part in last.lower() for part in _EMBEDDINGS):
        return "an embedding"
    if last in _TRANSPOSED:
        return "stored transposed (Conv1D)"
    return None
