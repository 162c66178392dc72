"""Account for the values of a checkpoint that are in no pair."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from ckptdiff.checkpoint.pairs import Pairing
from ckptdiff.checkpoint.weights import Assembled, CommonPart
from ckptdiff.figures.coverage import EXCLUDED, PARTLY

__all__ = ["left_out"]


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
        The others: name, number of values, and why they are not compared. With the compared ones and those under a
        second name they are all values of the side, each once.
    """
    number = 0 if side == "base" else 1
    weights, excluded = pairing.weights[number], pairing.excluded[number]
    whole, partly = _compared(pairing, side)
    only = pairing.only_in_base if side == "base" else pairing.only_in_tuned
    why = dict.fromkeys(only, f"only in {side}")
    why |= {getattr(bad, side).name: bad.reason for bad in pairing.mismatched}
    tied = 0
    for alias in pairing.aliased:
        if alias.side != side:
            continue
        if alias.by == "config":
            why[alias.name] = f"tied to {alias.of} by config.json alone"
        elif alias.of in whole or alias.of in partly:
            tied += weights[alias.name].numel
        else:
            why[alias.name] = f"tied to {alias.of}, which is not compared"
    others = [(name, count, EXCLUDED) for name, count in excluded.items()]
    others += [(name, weights[name].numel, reason) for name, reason in why.items()]
    for name in dict.fromkeys((*partly, *excluded)):
        left = weights[name].numel - partly[name] - excluded.get(name, 0)
        if left > 0 and name not in why and name not in whole:
            others.append((name, left, PARTLY.format(side=side)))
    return tied, others


def _compared(pairing: Pairing, side: Literal["base", "tuned"]) -> tuple[set[str], Counter[str]]:
    """Weights of a side that are a side of a pair as they are, and how many values are in pairs of the others.

    Those of an embedding that is a head too count once.
    """
    weights = pairing.weights[0 if side == "base" else 1]
    whole, partly = set[str](), Counter[str]()
    for pair in pairing.pairs:
        weight = pair.base if side == "base" else pair.tuned
        if isinstance(weight, CommonPart) and isinstance(weight.whole, Assembled):
            weight = weight.whole
        if isinstance(weight, Assembled):
            partly.update(weight.taken)
        elif weight is weights[weight.name]:
            whole.add(weight.name)
        elif not pair.untied or weight.name == pair.name:
            partly[weight.name] += weight.numel
    return whole, partly
