"""Find tensors stored under two names: an output head tied to the token embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ckptdiff.checkpoint.checkpoint import Checkpoint
from ckptdiff.checkpoint.dtypes import Kind
from ckptdiff.checkpoint.encodings import is_scaled, scaled_modules
from ckptdiff.checkpoint.header import TensorInfo
from ckptdiff.checkpoint.model_config import says_tied
from ckptdiff.checkpoint.names import locate
from ckptdiff.checkpoint.weights import Source

__all__ = ["Evidence", "SameValues", "Tie", "Ties", "find_ties", "left_embedding"]

Evidence: TypeAlias = Literal["values", "config"]
"""Why a tensor counts as another one: equal values, or the word of ``config.json``."""

SameValues: TypeAlias = Callable[[TensorInfo, TensorInfo], bool]
"""Tells whether two floating tensors of one shape hold the same values; it reads them."""

_TOKEN_EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared", "embeddings"}
)


@dataclass(frozen=True, slots=True)
class Tie:
    """What a tensor is tied to, and how that is known.

    Attributes
    ----------
    of : str
        A tensor of the same checkpoint, which is tied to none itself.
    by : {"values", "config"}
    """

    of: str
    by: Evidence


@dataclass(frozen=True, slots=True)
class Ties:
    """What is known of the tensors that one side lacks.

    Attributes
    ----------
    found : dict of str to Tie
        By the names of those that are another tensor.
    warnings : tuple of str
        Where values and ``config.json`` disagree, or values could not be looked at.
    """

    found: dict[str, Tie]
    warnings: tuple[str, ...]


def find_ties(
    storing: Checkpoint,
    matched: Iterable[str],
    alone: Sequence[str],
    side: Literal["base", "tuned"],
    same_values: SameValues | None,
) -> Ties:
    """Find out which tensors that the other side lacks are others of their own side once more.

    Models with tied embeddings are saved with or without ``lm_head.weight`` (T5: with or without the encoder's and
    decoder's ``embed_tokens``). That the names fit says nothing: an untied model saved without its head looks the same.

    Parameters
    ----------
    storing : Checkpoint
        The side that stores them.
    matched : iterable of str
        Its tensors that have a counterpart.
    alone : sequence of str
        Those without.
    side : {"base", "tuned"}
        What `storing` is called.
    same_values : callable or None
        Asked about a head and each embedding of its side and shape; its answer is the last word. None where no data is
        to be read.

    Returns
    -------
    Ties
        What ``config.json`` says is taken only where values cannot be looked at: nothing is read, or an fp8 tensor has
        a scale beside it, without which its codes are no values.
    """
    if not alone:
        return Ties({}, ())
    tensors = storing.tensors
    # Those that are compared come first: they are what a tie is best known by.
    present = [tensors[name] for name in (*matched, *alone)]
    found: dict[str, Tie] = {}
    warnings: list[str] = []
    scaled = scaled_modules(tensors)
    for name in alone:
        tensor = tensors[name]
        if not _is_tied_in_some_models(tensor):
            continue
        embeddings = [
            other
            for other in present
            if other.name not in found and other.shape == tensor.shape and _may_be_tied(tensor, other)
        ]
        if not embeddings:
            continue
        readable = [other for other in embeddings if not (is_scaled(tensor, scaled) or is_scaled(other, scaled))]
        equal = next((other for other in readable if same_values is not None and same_values(tensor, other)), None)
        if equal is not None:
            found[name] = Tie(equal.name, "values")
            continue
        said, problem = says_tied(storing)
        if problem is not None:
            warnings.append(problem)
        first = embeddings[0].name
        if same_values is not None and readable:
            if said:
                warnings.append(f"{name} is stored only in {side}, tied by its config.json, and differs from {first}")
        elif said:
            found[name] = Tie(first, "config")
            warnings.append(f"{name} is stored only in {side}: tied to {first} by its config.json, not by its values")
        elif same_values is None:
            warnings.append(f"{name} is stored only in {side}: to tell whether it equals {first}, data has to be read")
    return Ties({name: Tie(_last(found, name), tie.by) for name, tie in found.items()}, tuple(dict.fromkeys(warnings)))


def left_embedding(head: Source, other: Checkpoint, weights: Iterable[Source]) -> Source | None:
    """The embedding of the other side that stands for a head which only one side stores.

    Parameters
    ----------
    head : TensorInfo or Decoded
    other : Checkpoint
    weights : iterable of (TensorInfo or Decoded)
        Its weights.

    Returns
    -------
    TensorInfo or Decoded or None
        It may have more rows or fewer, if none has as many. None if that is no head, or the other side does not tie
        its own by its ``config.json``.
    """
    if not _is_tied_in_some_models(head) or not says_tied(other)[0]:
        return None
    fitting = (weight for weight in weights if _may_be_tied(head, weight))
    return min(fitting, key=lambda weight: weight.shape != head.shape, default=None)


def _last(found: dict[str, Tie], name: str) -> str:
    """The end of a chain of ties; there is no ring, since nothing is tied to what is tied already."""
    while name in found:
        name = found[name].of
    return name


def _is_tied_in_some_models(tensor: Source) -> bool:
    """Whether it is an output head, or the embedding of an encoder or a decoder."""
    place = locate(tensor.name)
    if tensor.kind is not Kind.FLOAT or len(tensor.shape) != 2 or place.tower != "language":
        return False
    is_head = place.module_type == "lm_head" and tensor.name.endswith(".weight")
    return is_head or tensor.name.endswith("coder.embed_tokens.weight")


def _may_be_tied(tensor: Source, other: Source) -> bool:
    """Whether the other is a token embedding that could be the tensor, but for its dtype and rows."""
    if (
        len(other.shape) != 2
        or other.shape[1] != tensor.shape[1]
        or other.kind is not Kind.FLOAT
        or other.name == tensor.name
    ):
        return False
    parts = other.name.split(".")
    if len(parts) < 2 or parts[-1] != "weight" or locate(other.name).tower != "language":
        return False
    return parts[-2] in _TOKEN_EMBEDDINGS
