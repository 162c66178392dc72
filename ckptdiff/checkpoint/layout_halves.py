"""Look whether gate and up share tensors in another order than their layouts say: headers do not tell, values do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeAlias

from ckptdiff.checkpoint.dtypes import Kind
from ckptdiff.checkpoint.layout_fit import Block, Flips, StoredPart, UnfitError
from ckptdiff.checkpoint.pairs import Orders, TensorPair
from ckptdiff.checkpoint.weights import Assembled, Weight

__all__ = ["Likeness", "other_orders", "unusual_halves"]

Likeness: TypeAlias = Callable[[Weight, Weight], float]
"""Reads a sample of two sides of one shape: the cosine between them."""

_SWAPPED: Final = {"gate": "up", "up": "gate"}
_ALIKE: Final = 0.5
"""Cosine from which on a sample speaks for an order: that of unrelated weights is near 0, and that of a fine-tuned or
quantised model with its base near 1."""


def other_orders(block: Block, base: StoredPart, flips: Sequence[Flips]) -> Orders:
    """Put a tensor of the base together as if gate and up lay in another order on one side.

    Parameters
    ----------
    block : Block
        With halves.
    base : StoredPart
        One of its tensors of the base.
    flips : sequence of Flips
        Which way axes may go.

    Returns
    -------
    Orders
        Empty where nothing fits.
    """
    found = []
    for said, mine, theirs in _turned(block):
        other = Block(mine, theirs)
        for flip in set(other.fitting()[0]) & set(flips):
            try:
                pieces, missing = other.pieces(mine[block.base.index(base)], flip)
            except UnfitError:
                continue
            if not missing:
                found.append((said, Assembled(base.source.name, pieces[0].source.dtype, base.source.shape, pieces)))
    return tuple(found)


def _turned(block: Block) -> Iterator[tuple[str, list[StoredPart], list[StoredPart]]]:
    base, tuned = block.base, block.tuned
    swapped = [replace(one, parts=tuple(_SWAPPED[part] for part in one.parts)) for one in tuned]
    yield "swapped in tuned", base, swapped
    side, held = ("tuned", tuned) if len(tuned[0].parts) > 1 else ("base", base)
    turned = [replace(one, interleaved=not one.interleaved) for one in held]
    said = f"{'in turns' if turned[0].interleaved else 'one after the other'} in {side}"
    yield said, *((base, turned) if side == "tuned" else (turned, tuned))


def unusual_halves(pairs: Iterable[TensorPair], orders: Mapping[str, Orders], likeness: Likeness) -> Iterator[str]:
    """Say where values agree far better with another order of gate and up than with the usual one.

    Parameters
    ----------
    pairs : iterable of TensorPair
    orders : mapping of str to Orders
        By base name.
    likeness : callable

    Raises
    ------
    CheckpointError
        If a sample cannot be read.
    """
    for pair in pairs:
        if pair.base.kind is not Kind.FLOAT or not orders.get(pair.name):
            continue
        usual = likeness(pair.base, pair.tuned)
        found, said = max((likeness(pair.base, other), said) for said, other in orders[pair.name])
        if found > max(_ALIKE, 2 * usual):
            yield (
                f"{pair.name}: gate and up look {said}, and are compared as their layout says: of a sample the cosine"
                f" with {pair.tuned.name} is {usual:.2f} so, {found:.2f} otherwise"
            )
