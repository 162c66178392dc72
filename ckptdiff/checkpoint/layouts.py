"""Find the pieces of one checkpoint's tensors that together are a tensor of the other.

Experts one by one or in one tensor, gate and up or q, k and v fused or not, axes swapped, rows that take turns, other
names of the same tensor: names are read by the table of layouts (``layout_table.py``, ``layout_names.py``), and shapes
decide what names leave open (``layout_fit.py``). What does not add up is named and left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ckptdiff.checkpoint.dtypes import DTYPES, Kind
from ckptdiff.checkpoint.layout_fit import Block, Flips, StoredPart, UnfitError
from ckptdiff.checkpoint.layout_halves import other_orders
from ckptdiff.checkpoint.layout_names import BLOCK_OF_PART, Names, Reading, Where
from ckptdiff.checkpoint.matching import unwrapped
from ckptdiff.checkpoint.names import locate
from ckptdiff.checkpoint.pairs import Orders
from ckptdiff.checkpoint.weights import Assembled, Source
from ckptdiff.errors import first_few, plural

__all__ = ["Assembly", "assemble", "orders_by_name", "reopened"]

_Key: TypeAlias = tuple[Where, str, str]
_Scope: TypeAlias = tuple[object, ...]
_ByName: TypeAlias = defaultdict[Where, list[Source]]
_GATED, _DOWN = BLOCK_OF_PART["gate"], BLOCK_OF_PART["down"]


@dataclass(frozen=True, slots=True)
class Assembly:
    """What tensors of the base are made of on the tuned side.

    Attributes
    ----------
    renamed : dict of str to str
        Base name to tuned name, where both are whole tensors of one shape, or embeddings of one width.
    assembled : dict of str to Assembled
        By base name; in part, where the tuned side lacks pieces of it.
    rules : dict of str to str
        For each of both, the layouts by which it was found, such as "gate_up_proj = gate_proj, up_proj".
    used : frozenset of str
        Tuned names of which every element has a counterpart.
    partly : dict of str to int
        Tuned names of which only some have one, and how many have none.
    warnings : tuple of str
        What could not be put together, and what it lacks.
    orders : dict of str to Orders
        By base name, one for each rule: what it would be made of if gate and up lay in another order.
    """

    renamed: dict[str, str]
    assembled: dict[str, Assembled]
    rules: dict[str, str]
    used: frozenset[str]
    partly: dict[str, int]
    warnings: tuple[str, ...]
    orders: dict[str, Orders]


def assemble(base: Mapping[str, Source], tuned: Mapping[str, Source]) -> Assembly:
    """Find what the base's tensors are made of, among tensors that have no counterpart by name.

    Parameters
    ----------
    base, tuned : mapping of str to TensorInfo or Decoded
        By name. A tensor that belongs to one of them by its name may be among them (see :func:`reopened`).

    Returns
    -------
    Assembly
        Nothing in it was guessed: names that could be read in two ways are in a warning.
    """
    search = _Search()
    blocks, others = search.sort(base, tuned)
    for key, flips in search.orient(blocks).items():
        for stored in blocks[key].base:
            search.take(blocks[key], stored, flips)
    search.rename(*others)
    return search.result(tuned)


def reopened(pairs: Iterable[tuple[Source, Source]]) -> frozenset[str]:
    """Find pairs by name whose layouts may differ all the same.

    Experts whose axes are swapped have the shape that they had where they are square: ``down_proj`` [E, 2880, 2880] of
    GPT-OSS tells nothing, ``gate_up_proj`` beside it does.

    Parameters
    ----------
    pairs : iterable of (TensorInfo or Decoded, TensorInfo or Decoded)
        Base and tuned, matched by name.

    Returns
    -------
    frozenset of str
        Base names of pairs that :func:`assemble` should look at: those of a known layout whose shapes have the same
        sizes in another order, and those whose axes go the same way as theirs.
    """
    found = list(pairs)
    if all(base.shape == tuned.shape for base, tuned in found):
        return frozenset()
    names = Names()
    scopes: defaultdict[_Scope, list[str]] = defaultdict(list)
    differ = set()
    for base, tuned in found:
        _, inside, reading, expert = names.read(base.name)
        stored = None if reading is None else _stored(base, reading, inside, expert, frozenset())
        if stored is None or not stored.open:
            continue
        scope = _scope(inside, stored)
        scopes[scope].append(base.name)
        if base.shape != tuned.shape and sorted(base.shape) == sorted(tuned.shape):
            differ.add(scope)
    return frozenset(name for scope in differ for name in scopes[scope])


def orders_by_name(pairs: Iterable[tuple[Source, Source]]) -> dict[str, Orders]:
    """Find pairs by name, one for each layout, that hold a gate and what it gates on both sides.

    Parameters
    ----------
    pairs : iterable of (TensorInfo or Decoded, TensorInfo or Decoded)
        Base and tuned, matched by name and of one shape.

    Returns
    -------
    dict of str to Orders
        By base name, what it would be made of if they lay in another order.
    """
    names, found, looked = Names(), dict[str, Orders](), set[str]()
    for base, tuned in pairs:
        reading = names.reading(base.name)
        if reading is None or len(reading.parts) < 2 or reading.spelling in looked:
            continue
        _, inside, _, expert = names.read(base.name)
        stored = [_stored(side, reading, inside, expert, frozenset()) for side in (base, tuned)]
        if stored[0] is not None and stored[1] is not None:
            block = Block([stored[0]], [stored[1]])
            if block.has_halves:
                looked.add(reading.spelling)
                found[base.name] = other_orders(block, stored[0], block.flips)
    return found


def _stored(
    source: Source, reading: Reading, inside: Where, expert: int | None, biased: frozenset[Where] | set[Where]
) -> StoredPart | None:
    """Put a tensor in its place, if it has as many axes as its layout asks for."""
    axes = len(source.shape) - (1 if reading.kind == "bias" else reading.layout.ndim)
    if axes not in (0, 1) or (axes and expert is not None):
        return None
    layout, stacked = reading.layout, axes == 1
    interleaved = layout.interleaved
    if interleaved is None:
        interleaved = (stacked or expert is not None) and inside in biased
    return StoredPart(source, reading, reading.parts, expert, stacked, reading.opens(stacked), interleaved)


def _scope(inside: Where, stored: StoredPart) -> _Scope:
    """What has its axes in the same order: the experts of a layer, or all Conv1D of a model."""
    return inside if stored.stacked else (inside[0],)


class _Search:
    """What was found so far."""

    def __init__(self) -> None:
        self._renamed: dict[str, str] = {}
        self._assembled: dict[str, Assembled] = {}
        self._rules: dict[str, str] = {}
        self._taken: defaultdict[str, int] = defaultdict(int)
        self._refused: set[str] = set()
        self._warnings: defaultdict[str, list[str]] = defaultdict(list)
        self._orders: dict[str, Orders] = {}
        self._looked: set[str] = set()

    def sort(
        self, base: Mapping[str, Source], tuned: Mapping[str, Source]
    ) -> tuple[dict[_Key, Block], tuple[_ByName, _ByName]]:
        """Sort all tensors: into blocks that both sides have, and by name."""
        names = Names()
        read = [[(source, *names.read(name)) for name, source in side.items()] for side in (base, tuned)]
        biased = {
            inside
            for side in read
            for _, _, inside, reading, _ in side
            if reading is not None and reading.kind == "bias" and inside[1].endswith("experts")
        }
        blocks: defaultdict[_Key, Block] = defaultdict(Block)
        by_name: tuple[_ByName, _ByName] = (defaultdict(list), defaultdict(list))
        for side, entries in enumerate(read):
            for source, whole, inside, reading, expert in entries:
                by_name[side][whole].append(source)
                stored = None if reading is None else _stored(source, reading, inside, expert, biased)
                if stored is not None:
                    block = blocks[inside, stored.reading.block, stored.reading.kind]
                    (block.tuned if side else block.base).append(stored)
        both = {key: block for key, block in blocks.items() if block.base and block.tuned}
        return both, by_name

    def orient(self, blocks: Mapping[_Key, Block]) -> dict[_Key, list[Flips]]:
        """Find which way the axes of each block go; what has them in the same order decides together."""
        fitting: dict[_Key, list[Flips]] = {}
        allowed: dict[_Scope, set[Flips]] = {}
        scopes: dict[_Key, _Scope] = {}
        for key, block in blocks.items():
            flips, reason = block.fitting()
            if not flips:
                if not block.of_twins:
                    self._refuse(reason, [stored.source.name for stored in block.base])
                continue
            fitting[key] = flips
            opened = [stored for stored in (*block.base, *block.tuned) if stored.open]
            if opened:
                scopes[key] = _scope(key[0], opened[0])
                allowed[scopes[key]] = allowed.get(scopes[key], set(flips)) & set(flips)
        chosen: dict[_Key, list[Flips]] = {}
        for key, flips in fitting.items():
            # Where nothing fits all blocks of a scope, each is left to itself.
            left = [one for one in flips if one in allowed.get(scopes.get(key, ()), flips)] or flips
            if len(left) > 1 and key[1] == _GATED:
                down = blocks.get((key[0], _DOWN, key[2]))
                left = [one for one in left if down is None or _mirrored(blocks[key], down, one)] or left
            chosen[key] = left
        return chosen

    def take(self, block: Block, base: StoredPart, flips: Sequence[Flips]) -> None:
        """Put a tensor of the base together, or say why not."""
        name = base.source.name
        try:
            pieces, missing = block.pieces(base, flips[0])
            if any(block.pieces(base, other)[0] != pieces for other in flips[1:]):
                raise UnfitError("shapes do not tell whether axes are swapped")
            if not base.source.numel:
                raise UnfitError("it holds no values")
            dtypes = {piece.source.dtype for piece in pieces}
            if len(dtypes) > 1:
                raise UnfitError(f"their pieces differ in dtype, {' and '.join(sorted(dtypes))}")
            first = pieces[0].source
            if DTYPES[first.dtype].bits < 8:
                raise UnfitError(f"values of {first.dtype} share bytes")
            if base.source.dtype != first.dtype and not base.source.kind is first.kind is Kind.FLOAT:
                raise UnfitError(f"dtypes cannot be compared: {base.source.dtype} in base, {first.dtype} in tuned")
        except UnfitError as error:
            self._refuse(str(error), [name])
            return
        for note in block.notes:
            self._warnings[note].append(name)
        if missing:
            self._warnings[f"in part only, as {first_few(missing)}"].append(name)
        for piece in pieces:
            self._taken[piece.source.name] += piece.numel
        sources = dict.fromkeys(piece.source.name for piece in pieces)
        if len(pieces) == 1 and not missing and not pieces[0].transposed and first.shape == base.source.shape:
            self._renamed[name] = first.name
        else:
            self._assembled[name] = Assembled(_pattern(sources), first.dtype, base.source.shape, pieces)
        theirs = dict.fromkeys(block.spellings[source] for source in sources)
        rule = self._rules[name] = f"{base.reading.spelling} = {', '.join(theirs)}"
        if rule not in self._looked and not missing:
            self._looked.add(rule)
            if block.has_halves:
                self._orders[name] = other_orders(block, base, flips)

    def _refuse(self, reason: str, names: Sequence[str]) -> None:
        self._refused.update(names)
        self._warnings[f"left out, as {reason}"] += names

    def rename(self, base: _ByName, tuned: _ByName) -> None:
        """Pair what has one name in the words of the table, and was not found in blocks."""
        done = self._refused | self._renamed.keys() | self._assembled.keys()
        for whole, sources in base.items():
            mine = [source for source in sources if source.name not in done]
            theirs = [source for source in tuned.get(whole, ()) if source.name not in self._taken]
            if len(mine) == len(theirs) == 1:
                if not _alike(mine[0], theirs[0]):
                    self._refuse("it has another shape under its other name", [mine[0].name])
                    continue
                self._renamed[mine[0].name] = theirs[0].name
                self._rules[mine[0].name] = "another name"
                self._taken[theirs[0].name] = theirs[0].numel
            elif mine and theirs and len({unwrapped(source.name) for source in (*mine, *theirs)}) > 1:
                # Where only wrappers differ, matching.py has said so.
                names = [source.name for source in mine]
                self._refuse(f"more than one could be {first_few(source.name for source in theirs)}", names)

    def result(self, tuned: Mapping[str, Source]) -> Assembly:
        """All that was found."""
        rest = {name: tuned[name].numel - count for name, count in self._taken.items()}
        partly = {name: count for name, count in rest.items() if count}
        warnings = [
            f"{plural(len(names), 'tensor')} of base {reason}: {first_few(names)}"
            for reason, names in self._warnings.items()
        ]
        if partly:
            warnings.append(
                f"{plural(len(partly), 'tensor')} of tuned with {plural(sum(partly.values()), 'value')} that base"
                f" lacks: {first_few(partly)}"
            )
        used = frozenset(name for name, count in rest.items() if not count)
        return Assembly(self._renamed, self._assembled, self._rules, used, partly, tuple(warnings), self._orders)


def _alike(base: Source, tuned: Source) -> bool:
    if base.shape == tuned.shape:
        return True
    of_tokens = locate(base.name).block in ("embedding", "head")
    return of_tokens and len(base.shape) == len(tuned.shape) and base.shape[1:] == tuned.shape[1:]


def _mirrored(gated: Block, down: Block, flips: Flips) -> bool:
    """Whether experts come back from where their gate leads to: [I, H] and [H, I]."""
    try:
        there, back = gated.bodies(flips)[0].get("gate"), down.bodies(flips)[0].get("down")
    except UnfitError:
        return False
    return there is None or back is None or there == back[::-1]


def _pattern(names: Iterable[str]) -> str:
    """What names have in common, with ``*`` for the rest; at dots first, so that numbers are replaced whole."""
    paths = [name.split(".") for name in names]
    if len(paths) == 1:
        return ".".join(paths[0])
    if len({len(path) for path in paths}) > 1:
        return _starred({".".join(path) for path in paths})
    return ".".join(_starred(set(words)) for words in zip(*paths, strict=True))


def _starred(words: set[str]) -> str:
    if len(words) == 1:
        return min(words)
    if all(word.isdigit() for word in words):
        return "*"
    start = _common(words)
    end = _common({word[len(start) :][::-1] for word in words})
    return f"{start}*{end[::-1]}"


def _common(words: set[str]) -> str:
    """The start that all words share: that of the first and the last in order."""
    first, last = min(words), max(words)
    differ = (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return first[: next(differ, len(first))]
