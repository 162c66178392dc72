"""List the weights of a checkpoint: its tensors, with those that are codes and scales taken together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckptdiff.checkpoint.checkpoint import Checkpoint
from ckptdiff.checkpoint.encodings import find_encoded
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
    """List the weights of a checkpoint.

    Parameters
    ----------
    checkpoint : Checkpoint
    values : {"model", "codes"}
        Whether quantised weights are decoded, or codes and scales are tensors like any other.

    Raises
    ------
    CheckpointError
        The shape of a packed weight, which is stored as values, cannot be read.
    """
    if values == "codes":
        return SideWeights(checkpoint, checkpoint.tensors)
    encoded = find_encoded(checkpoint)
    if not encoded.weights:
        return SideWeights(checkpoint, checkpoint.tensors, encoded.warnings)
    by_codes = {weight.codes.name: weight for weight in encoded.weights.values()}
    named: dict[str, Source] = {}
    for name, tensor in checkpoint.tensors.items():
        if name in by_codes:
            named[by_codes[name].name] = by_codes[name]
        elif name not in encoded.parts:
            named[name] = tensor
    return SideWeights(checkpoint, named, encoded.warnings)
