"""Cut tensors of two checkpoints that hold the same parts into boxes that hold the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import islice
from typing import TypeAlias

from ckptdiff.checkpoint.layout_names import Reading
from ckptdiff.checkpoint.weights import Piece, Range, Source
from ckptdiff.errors import first_few

__all__ = ["Block", "Flips", "StoredPart", "UnfitError"]

Flips: TypeAlias = tuple[bool, bool]
"""Whether base and tuned store [in, out] where their layouts leave that open."""

_Shape: TypeAlias = tuple[int, ...]
_Held: TypeAlias = "tuple[StoredPart, Range | None, Range | None]"
_STACKED = -1
_SIDES = ("base", "tuned")


class UnfitError(Exception):
    """Parts that do not add up; the text says why, as the end of a sentence."""


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A tensor with what its name says of it.

    Attributes
    ----------
    source : TensorInfo or Decoded
    reading : Reading
    parts : tuple of str
        In their order.
    expert : int or None
        Whose it is, if it has a number.
    stacked : bool
        Its first axis runs over experts.
    open : bool
        Only shapes tell which way its last two axes go.
    interleaved : bool
        Rows of its parts take turns.
    """

    source: Source
    reading: Reading
    parts: tuple[str, ...]
    expert: int | None
    stacked: bool
    open: bool
    interleaved: bool

    def flipped(self, flip: bool) -> bool:
        """Whether the last two axes are [in, out]."""
        return flip if self.open else self.reading.flipped

    def body(self, flip: bool) -> _Shape:
        """Shape of one expert's rows of all parts, as [out, in]."""
        shape = self.source.shape[1:] if self.stacked else self.source.shape
        return (*shape[:-2], shape[-1], shape[-2]) if self.flipped(flip) else shape

    def index(self, body: _Shape, rows: Range, experts: Range | None, flip: bool) -> tuple[Range, ...]:
        """Its ranges that hold some rows, of some experts if it is of several."""
        return _index(body, rows, self.flipped(flip), experts if self.stacked else None)


# Layers have the same shapes: a model has few indices, and many tensors.
@lru_cache(maxsize=4096)
def _index(body: _Shape, rows: Range, flipped: bool, experts: Range | None) -> tuple[Range, ...]:
    ranges: list[Range] = [rows, *((0, size, 1) for size in body[1:])]
    if flipped:
        ranges[-1], ranges[-2] = ranges[-2], ranges[-1]
    return tuple(ranges) if experts is None else (experts, *ranges)


@dataclass(frozen=True)
class Block:
    """Tensors of both sides that hold parts of one block of a module, of one kind.

    Attributes
    ----------
    base, tuned : list of StoredPart
    """

    base: list[StoredPart] = field(default_factory=list)
    tuned: list[StoredPart] = field(default_factory=list)
    _bodies: dict[Flips, dict[str, _Shape]] = field(default_factory=dict)

    @cached_property
    def whole(self) -> bool:
        """Whether all tensors hold the same parts in the same order, so that nobody needs to tell them apart."""
        return len({(stored.parts, stored.interleaved) for stored in (*self.base, *self.tuned)}) == 1

    @property
    def of_twins(self) -> bool:
        """Whether it is one tensor of each side under two names, so that there is nothing to cut."""
        return self.whole and len(self.base) == len(self.tuned) == 1 and not (self.base[0].open or self.tuned[0].open)

    @cached_property
    def has_halves(self) -> bool:
        """Whether some tensor holds a gate and what it gates."""
        return any(set(stored.parts) == {"gate", "up"} for stored in (*self.base, *self.tuned))

    @cached_property
    def spellings(self) -> dict[str, str]:
        """The row of the table by which each tensor of the tuned side was read."""
        return {stored.source.name: stored.reading.spelling for stored in self.tuned}

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What was assumed of rows."""
        layouts = [[stored.reading.layout for stored in side] for side in (self.base, self.tuned)]
        notes = []
        if {layout.permuted for layout in layouts[0]} != {layout.permuted for layout in layouts[1]}:
            notes.append("taken with rows of q and k as they are, which Step-3.5 permutes")
        if not self.whole and any(
            stored.interleaved and stored.reading.layout.interleaved is None for stored in (*self.base, *self.tuned)
        ):
            notes.append("taken with gate and up in turns, as in GPT-OSS, because experts have biases")
        return tuple(notes)

    @cached_property
    def flips(self) -> tuple[Flips, ...]:
        """What the sides may do with axes whose order is open."""
        base, tuned = (
            (False, True) if any(stored.open for stored in side) else (False,) for side in (self.base, self.tuned)
        )
        return tuple((one, other) for one in base for other in tuned)

    @cached_property
    def slots(self) -> tuple[dict[str, dict[int | None, StoredPart]], dict[str, dict[int | None, StoredPart]]]:
        """By side, part and expert's number, the tensor that holds it.

        Raises
        ------
        UnfitError
            Two tensors of a side hold the same.
        """
        return self._slots(0), self._slots(1)

    def _slots(self, side: int) -> dict[str, dict[int | None, StoredPart]]:
        slots: dict[str, dict[int | None, StoredPart]] = {}
        for stored in (self.base, self.tuned)[side]:
            key = _STACKED if stored.stacked else stored.expert
            for part in self._parts(stored):
                held = slots.setdefault(part, {})
                other = held.setdefault(key, stored)
                if other is not stored or (len(held) > 1 and (_STACKED in held or None in held)):
                    other = next(one for one in held.values() if one is not stored)
                    raise UnfitError(
                        f"{_SIDES[side]} stores their {part} twice, such as in {other.source.name} and"
                        f" {stored.source.name}"
                    )
        return slots

    def _parts(self, stored: StoredPart) -> tuple[str, ...]:
        return (" and ".join(stored.parts),) if self.whole else stored.parts

    def fitting(self) -> tuple[list[Flips], str]:
        """Which of `flips` make the most parts fit, and why the first makes none fit if that is so of all."""
        permuted = {any(stored.reading.layout.permuted for stored in side) for side in (self.base, self.tuned)}
        if len(permuted) > 1:
            return [], "rows of q and k may be permuted on one side for rotary embeddings"
        found: list[tuple[int, Flips]] = []
        reasons = []
        for flips in self.flips:
            try:
                self._bodies[flips], unfit = self.bodies(flips)
                if unfit and len(unfit) == len(self.slots[0].keys() & self.slots[1].keys()):
                    raise UnfitError(next(iter(unfit.values())))
                found.append((len(unfit), flips))
            except UnfitError as error:
                reasons.append(str(error))
        least = min((unfit_parts for unfit_parts, _ in found), default=0)
        return [flips for unfit_parts, flips in found if unfit_parts == least], reasons[0] if reasons else ""

    def bodies(self, flips: Flips) -> tuple[dict[str, _Shape], dict[str, str]]:
        """Shape of each part of one expert, as far as fused tensors and stacks tell, and why parts do not fit.

        Raises
        ------
        UnfitError
            Nothing tells where the parts of a tensor end, or a side stores one twice.
        """
        bodies: dict[str, _Shape] = {}
        unfit: dict[str, str] = {}
        common = [part for part in self.slots[0] if part in self.slots[1]]
        for side, flip in enumerate(flips):
            for stored in (self.base, self.tuned)[side]:
                parts = self._parts(stored)
                if len(parts) == 1 and not stored.stacked:
                    continue
                body = stored.body(flip)
                shapes = [body] if len(parts) == 1 else self._split(stored, body, side, flips)
                for part, shape in zip(parts, shapes, strict=True):
                    if bodies.setdefault(part, shape) != shape and part in common:
                        unfit[part] = f"the {part} of {stored.source.name} is {shape}, not {bodies[part]}"
        for part in common:
            reason = self._unfit_singles(part, bodies.get(part), flips)
            if reason:
                unfit.setdefault(part, reason)
        return bodies, unfit

    def _unfit_singles(self, part: str, body: _Shape | None, flips: Flips) -> str:
        """Say where no tensor that holds a part alone has a shape that fits."""
        base, tuned = self._singles(0, part), self._singles(1, part)
        for side, held in enumerate((base, tuned)):
            if body is not None and held and not any(one.body(flips[side]) == body for one in held.values()):
                return f"no {part} of {_SIDES[side]} has shape {body}"
        if body is None and not any(
            key in tuned and tuned[key].body(flips[1]) == one.body(flips[0]) for key, one in base.items()
        ):
            return f"no {part} has the same shape on both sides"
        return ""

    def _singles(self, side: int, part: str) -> dict[int | None, StoredPart]:
        """Tensors that hold a part of one module or expert alone, by the expert's number."""
        held = self.slots[side].get(part, {})
        first = next(iter(held.values()), None)
        return {} if first is None or first.stacked or len(self._parts(first)) > 1 else held

    def _split(self, stored: StoredPart, body: _Shape, side: int, flips: Flips) -> list[_Shape]:
        total, count = body[0], len(stored.parts)
        found = [next(iter(self._singles(1 - side, part).values()), None) for part in stored.parts]
        known = [None if one is None else one.body(flips[1 - side])[0] for one in found]
        equal = stored.reading.layout.equal or stored.interleaved
        if not equal and known.count(None) == count:
            raise UnfitError(f"nothing tells where parts of {stored.source.name} end")
        rest, unknown = total - sum(rows or 0 for rows in known), known.count(None)
        if equal and total % count:
            raise UnfitError(f"{stored.source.name} has {total} rows, which are not {count} equal parts")
        if equal or (unknown > 1 and all(rows is None or rows * count == total for rows in known)):
            rows = [total // count] * count
        else:
            # Where missing parts end is of no account if all that are there lie before or behind them.
            places = [place for place, rows in enumerate(known) if rows is None]
            if unknown and places[-1] - places[0] >= unknown:
                raise UnfitError(f"nothing tells where parts of {stored.source.name} end")
            shares = [rest // unknown] * (unknown - 1) if unknown else []
            left = iter([*shares, rest - sum(shares)])
            rows = [next(left) if one is None else one for one in known]
            if sum(rows) != total or min(rows) <= 0:
                raise UnfitError(f"{stored.source.name} has {total} rows, its parts {_listed(known)}")
        return [(one, *body[1:]) for one in rows]

    def pieces(self, base: StoredPart, flips: Flips) -> tuple[tuple[Piece, ...], tuple[str, ...]]:
        """Take a tensor of the base from those of the tuned side, once they fit.

        Returns
        -------
        tuple of Piece
            One at least.
        tuple of str
            What is missing.

        Raises
        ------
        UnfitError
            All of it is.
        """
        pieces: list[Piece] = []
        missing: list[str] = []
        for part in self._parts(base):
            sources, lacking = self._sources(base, part)
            missing += [lacking] if lacking else []
            for held, mine, theirs in sources:
                try:
                    pieces.append(self._piece(base, held, part, (mine, theirs), flips))
                except UnfitError as error:
                    missing.append(str(error))
        if not pieces:
            raise UnfitError(first_few(missing))
        return tuple(pieces), tuple(dict.fromkeys(missing))

    def _sources(self, base: StoredPart, part: str) -> tuple[list[_Held], str]:
        """What holds a part, with the entries of the expert axis on either side, and what is missing of it."""
        held = self.slots[1].get(part, {})
        stack = held.get(_STACKED)
        if base.stacked:
            experts = base.source.shape[0]
            if stack is not None:
                theirs = stack.source.shape[0]
                both = (0, min(experts, theirs), 1)
                return [(stack, both, both)], "" if theirs >= experts else f"tuned has {theirs} experts, base {experts}"
            known = sorted(expert for expert in held if expert is not None and expert < experts)
            missing = islice((expert for expert in range(experts) if expert not in held), 4)
            lacking = f"tuned has no {part} of expert {first_few(map(str, missing))}" if len(known) < experts else ""
            return [(held[expert], (expert, expert + 1, 1), None) for expert in known], lacking
        if base.expert in held:
            return [(held[base.expert], None, None)], ""
        if stack is not None and base.expert is not None:
            if base.expert >= stack.source.shape[0]:
                return [], f"tuned has {stack.source.shape[0]} experts in one tensor"
            return [(stack, None, (base.expert, base.expert + 1, 1))], ""
        return [], f"tuned has no {part}" + ("" if base.expert is None else f" of expert {base.expert}")

    def _piece(
        self,
        base: StoredPart,
        tuned: StoredPart,
        part: str,
        experts: tuple[Range | None, Range | None],
        flips: Flips,
    ) -> Piece:
        indices, bodies = [], self._bodies[flips]
        for stored, some, flip in zip((base, tuned), experts, flips, strict=True):
            parts, body = self._parts(stored), stored.body(flip)
            expected = bodies.get(part, base.body(flips[0]))
            if len(parts) > 1:
                expected = (sum(bodies[one][0] for one in parts), *expected[1:])
            if body != expected:
                raise UnfitError(f"{stored.source.name} has shape {stored.source.shape}, where {expected} is right")
            indices.append(stored.index(body, _rows(stored, parts, part, bodies, body[0]), some, flip))
        transposed = base.flipped(flips[0]) != tuned.flipped(flips[1])
        return Piece(tuned.source, indices[0], indices[1], transposed)


def _rows(stored: StoredPart, parts: Sequence[str], part: str, bodies: Mapping[str, _Shape], total: int) -> Range:
    if len(parts) == 1:
        return (0, total, 1)
    place = parts.index(part)
    if stored.interleaved:
        return (place, total, len(parts))
    start = sum(bodies[other][0] for other in parts[:place])
    return (start, start + bodies[part][0], 1)


def _listed(known: Sequence[int | None]) -> str:
    return " and ".join("?" if rows is None else str(rows) for rows in known)
