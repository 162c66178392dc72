"""Account for the values of a checkpoint that are in no pair."""

from __future__ import annotations

from typing import Literal

from ckptdiff.checkpoint.checkpoint import Checkpoint
from ckptdiff.checkpoint.pairing import Pairing

__all__ = ["EXCLUDED", "left_out"]

EXCLUDED = "left out by --include and --exclude"
"""Why a tensor that the user did not ask for is not compared."""


def left_out(
    pairing: Pairing, side: Literal["base", "tuned"], storing: Checkpoint
) -> tuple[int, list[tuple[str, int, str]]]:
    """Tell what of one side is no part of a pair, and why.

    Parameters
    ----------
    pairing : Pairing
    side : {"base", "tuned"}
    storing : Checkpoint
        That side.

    Returns
    -------
    int
        Values of tensors that are a compared one under a second name: they count as compared.
    list of (str, int, str)
        The others: name, number of values, and why they are not compared.
    """
    compared = {getattr(pair, side).name for pair in pairing.pairs}
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
            tied += storing.tensors[alias.name].numel
        elif alias.side == side:
            why[alias.name] = f"tied to {alias.of}, which is not compared"
    return tied, [(name, storing.tensors[name].numel, reason) for name, reason in why.items()]
