"""Tell what is in an exact delta from its index alone: how much changes, where, and what it takes beside other ways."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ckptdiff.checkpoint.places import locate_all
from ckptdiff.patch.delta_file import open_delta

__all__ = ["PatchContents", "TensorRow", "contents_of", "mask_entropy_of", "modules_of"]


class TensorRow(NamedTuple):
    """What a patch says of a tensor."""

    name: str
    shape: tuple[int, ...]
    values: int
    changed: int
    """Of these values."""
    stored: int
    """Bytes that it takes in the patch."""


@dataclass(frozen=True, slots=True)
class PatchContents:
    """What an exact delta holds.

    Attributes
    ----------
    path : str
    identity : str
        SHA-256 of its index.
    made_by, base, tuned : str
        The program, and where the two sides lay.
    size : int
        Bytes of the delta.
    dense : int
        Bytes of the tuned side's files.
    tensors : dict of str to int
        How many are the same, changed, whole and lost.
    values, changed : int
        Codes of the tuned side, and how many of them differ from the base's; those of whole tensors all do.
    mask_entropy : float
        Bytes that it takes at least to say which codes changed, if those of each tensor are spread at random:
        sum of n H(k / n) / 8, with H the binary entropy (Shannon 1948), over tensors of n codes of which k changed.
    modules : list of dict
        ``module_type``, ``layer`` and ``tensors``, ``values``, ``changed`` and ``bytes`` of each group of both.
    digests : dict
        Of each tensor those of its bytes ``before`` and ``after``; null where it is new, or lost.
    """

    path: str
    identity: str
    made_by: str
    base: str
    tuned: str
    size: int
    dense: int
    tensors: dict[str, int]
    values: int
    changed: int
    mask_entropy: float
    modules: list[dict[str, Any]]
    digests: dict[str, dict[str, str | None]]

    @property
    def warnings(self) -> tuple[str, ...]:
        """That it does not pay, if so."""
        if self.size < self.dense:
            return ()
        return (f"the patch is not smaller than the checkpoint it leads to: {self.size:,} and {self.dense:,} bytes",)


def contents_of(path: str | os.PathLike[str]) -> PatchContents:
    """Read the index of an exact delta.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    PatchContents

    Raises
    ------
    PatchError
        It is none, or is damaged.
    CheckpointError
        It cannot be read.

    Examples
    --------
    >>> from ckptdiff import patch
    >>> made = patch.make("fixtures/addition/base", "fixtures/addition/tuned", "step.ckptdelta")
    >>> patch.contents_of("step.ckptdelta").tensors["changed"]
    24
    """
    with open_delta(path) as link:
        delta = link.delta
        states = {"same": 0, "changed": 0, "whole": 0, "lost": 0}
        for tensor in delta.tensors.values():
            states[tensor.state] += 1
        kept = [
            TensorRow(one.name, one.shape, one.codes, one.changed, one.stored)
            for one in delta.tensors.values()
            if one.state != "lost"
        ]
        return PatchContents(
            path=link.path,
            identity=link.identity,
            made_by=delta.made_by,
            base=delta.base,
            tuned=delta.tuned,
            size=link.size,
            dense=sum(one.size for one in delta.files),
            tensors=states,
            values=sum(one.values for one in kept),
            changed=sum(one.changed for one in kept),
            mask_entropy=mask_entropy_of(kept),
            modules=modules_of(kept),
            digests={name: {"before": one.before, "after": one.after} for name, one in delta.tensors.items()},
        )


def mask_entropy_of(tensors: Iterable[TensorRow]) -> float:
    """Bytes that it takes at least to say which values changed, if those of each tensor are spread at random."""
    total = 0.0
    for one in tensors:
        if 0 < one.changed < one.values:
            share = one.changed / one.values
            total -= one.values * (share * math.log2(share) + (1 - share) * math.log2(1 - share)) / 8
    return total


def modules_of(tensors: Sequence[TensorRow]) -> list[dict[str, Any]]:
    """What changes in each module type of each layer."""
    places = locate_all({one.name: one.shape for one in tensors})
    groups: defaultdict[tuple[int, str], dict[str, int]] = defaultdict(
        lambda: {"tensors": 0, "values": 0, "changed": 0, "bytes": 0}
    )
    for one in tensors:
        place = places[one.name]
        group = groups[-1 if place.layer is None else place.layer, place.module_type]
        for key, value in (("tensors", 1), ("values", one.values), ("changed", one.changed), ("bytes", one.stored)):
            group[key] += value
    return [
        {"layer": None if layer < 0 else layer, "module_type": module, **groups[layer, module]}
        for layer, module in sorted(groups)
    ]
