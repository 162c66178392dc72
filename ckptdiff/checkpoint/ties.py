"""Tensors stored under two names: an output head tied to the token embedding, or one region named twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from ckptdiff.checkpoint.dtypes import Kind
from ckptdiff.checkpoint.header import TensorInfo
from ckptdiff.checkpoint.names import locate

__all__ = ["tied_embedding", "twice_named"]

_TOKEN_EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared", "embeddings"}
)
Role = Literal["head", "embedding"]


def tied_embedding(name: str, storing: Mapping[str, TensorInfo], lacking: Mapping[str, TensorInfo]) -> str | None:
    """Decide whether a tensor that one side lacks is tied to a token embedding that both sides store.

    Models with tied embeddings are saved with or without ``lm_head.weight`` (T5: with or without the encoder's and
    decoder's ``embed_tokens``); the two forms are the same model.

    Parameters
    ----------
    name : str
        The tensor that only `storing` has.
    storing, lacking : mapping of str to TensorInfo
        The two checkpoints' tensors.

    Returns
    -------
    str or None
        The embedding's name in `storing`. None unless `name` is a head (or such an embedding), and `lacking` has
        a token embedding of its shape and no head of that shape. Both must be of a floating dtype, not of the same
        one: a side may be stored wider.
    """
    tensor = storing[name]
    role = _role(tensor)
    if role is None or not any(_may_be_tied(tensor, other, role) for other in lacking.values()):
        return None
    if role == "head" and any(other.shape == tensor.shape and _role(other) == role for other in lacking.values()):
        return None
    return next((other.name for other in storing.values() if _may_be_tied(tensor, other, role)), None)


def twice_named(tensors: Iterable[TensorInfo]) -> dict[str, str]:
    """Find names of one checkpoint that lead to the same bytes.

    Returns
    -------
    dict of str to str
        For each later name, the first one. Empty tensors share no bytes.
    """
    first: dict[tuple[int, int, int, int], str] = {}
    again: dict[str, str] = {}
    for tensor in tensors:
        if tensor.nbytes:
            name = first.setdefault(tensor.region, tensor.name)
            if name != tensor.name:
                again[tensor.name] = name
    return again


def _role(tensor: TensorInfo) -> Role | None:
    place = locate(tensor.name)
    if tensor.kind is not Kind.FLOAT or len(tensor.shape) != 2 or place.tower != "language":
        return None
    if place.module_type == "lm_head" and tensor.name.endswith(".weight"):
        return "head"
    return "embedding" if tensor.name.endswith("coder.embed_tokens.weight") else None


def _may_be_tied(tensor: TensorInfo, other: TensorInfo, role: Role) -> bool:
    if other.shape != tensor.shape or other.kind is not Kind.FLOAT or other.name == tensor.name:
        return False
    parts = other.name.split(".")
    if len(parts) < 2 or parts[-1] != "weight" or locate(other.name).tower != "language":
        return False
    return parts[-2] == "shared" if role == "embedding" else parts[-2] in _TOKEN_EMBEDDINGS
