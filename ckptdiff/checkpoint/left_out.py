"""Account for the values of a checkpoint that are in no pair."""

from __future__ import annotations

import math
from collections import Counter
from typing import Literal

from ckptdiff.checkpoint.pairs import Pairing
from ckptdiff.checkpoint.weights import Assembled

__all__ = ["EXCLUDED", "left_out"]

EXCLUDED = "left out by --include and --exclude"
"""Why a tensor that the user did not ask for is not compared."""


def left_out(pairing: Pairing, side: Literal["base", "tuned"]) -> tuple[int, list[tuple[str, int, str]]]:
    """Tell what of one side is no part of a pair, and why.

    Parameters
    ----------
    pairing : Pairing
    side : {"base", "tuned"}

    Returns
    -------
    int
        Values of tensors that are a compared one under a second name: they count as compared.
    list of (str, int, str)
        The others: name, number of values, and why they are not compared.
    """
    weights = pairing.weights[0 if side == "base" else 1]
    compared = _compared(pairing, side)
    sizes = {pair.name: pair.base.numel for pair in pairing.pairs}
    only = pairing.only_in_base if side == "base" else pairing.only_in_tuned
    excluded = pairing.excluded_of_base if side == "base" else pairing.excluded_of_tuned
    why = dict.fromkeys(only, f"only in {side}") | dict.fromkeys(excluded, EXCLUDED)
    why |= {getattr(bad, side).name: bad.reason for bad in pairing.mismatched}
    tied = 0
    for alias in pairing.aliased:
        if alias.side == "both":  # under whatever name the tuned side has it
            tied += sizes[alias.of]
        elif alias.side == side and alias.by == "config":
            why[alias.name] = f"tied to {alias.of} by config.json alone"
        elif alias.side == side and alias.of in compared:
            tied += weights[alias.name].numel
        elif alias.side == side:
            why[alias.name] = f"tied to {alias.of}, which is not compared"
    others = [(name, weights[name].numel, reason) for name, reason in why.items()]
    for name, count in compared.items():
        left = weights[name].numel - count
        if left > 0:
            others.append((name, left, f"rows, or a part, that are only in {side}"))
    return tied, others


def _compared(pairing: Pairing, side: Literal["base", "tuned"]) -> Counter[str]:
    """How many values of each weight of a side are in a pair; those of an embedding that is a head too once."""
    found: Counter[str] = Counter()
    for pair in pairing.pairs:
        weight = pair.base if side == "base" else pair.tuned
        if isinstance(weight, Assembled):
            for piece in weight.pieces:
                found[piece.source.name] += math.prod(len(range(*axis)) for axis in piece.tuned_index)
        elif not pair.untied or weight.name == pair.name:
            found[weight.name] += weight.numel
    return found
