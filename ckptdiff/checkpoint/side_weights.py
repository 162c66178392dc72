"""List the weights of a checkpoint: its tensors, with those that are codes and scales taken together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckptdiff.checkpoint.checkpoint import Checkpoint
from ckptdiff.checkpoint.weights import Source
from ckptdiff.options import Values

__all__ = ["SideWeights", "weights_of"]


@dataclass(frozen=True, slots=True)
class SideWeights:
    """The weights of one side.

    Attributes
    ----------
    checkpoint : Checkpoint
    named : mapping of str to Source
        In the order of its files.
    warnings : tuple of str
    """

    checkpoint: Checkpoint
    named: Mapping[str, Source]
    warnings: tuple[str, ...] = ()


def weights_of(checkpoint: Checkpoint, values: Values) -> SideWeights:
    """The weights of a checkpoint."""
    return SideWeights(checkpoint, checkpoint.tensors)
