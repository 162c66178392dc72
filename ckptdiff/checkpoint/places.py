"""Place all tensors of a checkpoint at once: which tower its own names mean, and which number each layer has."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

from ckptdiff.checkpoint.families import IMAGES, PLACES, SOUND, STACK, TOWERS, VOCABULARY, WORDS
from ckptdiff.checkpoint.names import Place, locate, split_numbers

__all__ = ["locate_all"]

Shapes: TypeAlias = Mapping[str, Sequence[int]]
_Layer: TypeAlias = tuple[str, tuple[str, ...], tuple[str, ...]]
"""A tower, the parts of a name with ``*`` for numbers, and these numbers."""

_STACK: Final = re.compile(STACK, re.IGNORECASE)
_NUMBER: Final = re.compile(r"[0-9]{1,9}")
# Lists inside of a layer are no layers: experts, a head's own linear layers.
_INNER: Final = re.compile(
    "|".join(PLACES[place] for place in ("attention", "mixer", "ffn", "embedding", "head")), re.I
)
_OUTER: Final = re.compile("|".join([*TOWERS.values(), "predictor"]), re.IGNORECASE)
_VOCABULARY: Final = re.compile(VOCABULARY)
_WORDS: Final = re.compile(WORDS)
_IMAGES: Final = re.compile(IMAGES)
_SOUND: Final = re.compile(SOUND)
_WEIGHT: Final = re.compile(r"weight$|\.parametrizations\.weight\.")
_CODER: Final = re.compile(r"(?:^|\.)(encoder|decoder)(?=\.)")


class _Kind(NamedTuple):
    """Tensors of one shape whose names differ in numbers alone. A model has few kinds, however many layers."""

    first: str
    """The first of their names, which is looked at for all."""
    place: Place
    stack: tuple[str, ...]
    depth: int
    """How many numbers of their names are those of the layer."""


def locate_all(shapes: Shapes) -> dict[str, Place]:
    """Find the places of all tensors of one model.

    They tell more than :func:`~ckptdiff.checkpoint.names.locate` can of one name. A model, or an encoder, that takes
    images or sound and no text is ``vision`` or ``audio`` throughout; the two stacks of a model of text are ``encoder``
    and ``decoder``. No two layers of a tower have one number: in a tower of one stack it is that of the name, else
    layers are counted through stages and stacks, those of a decoder last.

    Parameters
    ----------
    shapes : mapping of str to sequence of int
        Shape of each tensor of the checkpoint, by its raw name.

    Returns
    -------
    dict of str to Place
        By the names of `shapes`.

    Examples
    --------
    >>> shapes = {f"{side}.block.0.layer.0.SelfAttention.q.weight": (8, 8) for side in ("encoder", "decoder")}
    >>> [(place.tower, place.layer) for place in locate_all(shapes).values()]
    [('encoder', 0), ('decoder', 0)]
    """
    kinds: dict[tuple[str, tuple[int, ...], int], _Kind] = {}
    # Thousands of experts are in few layers: the spot of each tensor, as its place among all of them.
    spots: dict[tuple[str, tuple[str, ...]], int] = {}
    spot_of: list[int] = []
    for name, shape in shapes.items():
        form, numbers = split_numbers(name)
        # Dimensions of the weight that it belongs to.
        ndim = len(shapes.get(f"{name[:-4]}weight", shape) if name.endswith(".bias") else shape)
        key = form, tuple(shape), ndim
        kind = kinds.get(key)
        if kind is None:
            stack = _stack(name)
            kind = kinds[key] = _Kind(name, locate(name, ndim), stack, stack.count("*"))
        spot_of.append(spots.setdefault((kind.first, numbers[: kind.depth]), len(spots)))
    firsts = {kind.first: kind for kind in kinds.values()}
    towers = _towers({name: shapes[name] for name in firsts}, firsts)
    layers = [(towers[first], firsts[first].stack, number) for first, number in spots]
    numbered = _numbers(set(layers))
    found = [
        _place(firsts[first].place, layer[0], numbered.get(layer))
        for (first, _), layer in zip(spots, layers, strict=True)
    ]
    return dict(zip(shapes, map(found.__getitem__, spot_of), strict=True))


def _place(found: Place, tower: str, layer: int | None) -> Place:
    """What a name alone tells, corrected by what all names do."""
    classifies = found.module_type == "lm_head" and tower in ("vision", "audio")  # timm's "head"
    return Place(layer, tower, "head" if classifies else found.module_type, found.block)


def _stack(name: str) -> tuple[str, ...]:
    """The parts of a name up to the number of its layer, with ``*`` for numbers; none outside of the layers."""
    parts = name.split(".")
    end = 0
    for at, part in enumerate(parts[:-1]):
        if _NUMBER.fullmatch(part):
            before = parts[at - 1] if at else ""
            # T5's block.3.layer.0 is a part of a layer; Swin's layers.3.blocks.0 and SegFormer's block.3.0 are layers.
            inner = end == at - 1 > 0 and before in ("layer", "block")
            if inner or not (end == at > 0 or _is_stack(before)):
                break
            end = at + 1
        elif _is_inner(part):
            break
    return tuple("*" if _NUMBER.fullmatch(part) else part for part in parts[:end])


@lru_cache(maxsize=4096)
def _is_stack(part: str) -> bool:
    return _STACK.fullmatch(part) is not None


@lru_cache(maxsize=4096)
def _is_inner(part: str) -> bool:
    return _INNER.fullmatch(part) is not None and not _OUTER.fullmatch(part) and not _is_stack(part)


def _numbers(layers: Collection[_Layer]) -> dict[_Layer, int]:
    """The number of each layer; none of a stage, which has layers in it."""
    stages = {
        (stack[:end], number[: stack[:end].count("*")]) for _, stack, number in layers for end in range(1, len(stack))
    }
    stacks: defaultdict[str, defaultdict[tuple[str, ...], list[_Layer]]] = defaultdict(lambda: defaultdict(list))
    for layer in layers:
        tower, stack, number = layer
        if number and layer[1:] not in stages:
            stacks[tower][stack].append(layer)
    numbers = {}
    for found in stacks.values():
        # The largest stack comes first, so that a few layers beside it do not shift its numbers.
        ordered = sorted(found, key=lambda stack: ("decoder" in ".".join(stack), -len(found[stack]), stack))
        start = 0
        for stack in ordered:
            alone = start == 0 and stack.count("*") == 1
            for rank, layer in enumerate(sorted(found[stack], key=lambda layer: tuple(map(int, layer[2])))):
                numbers[layer] = int(layer[2][0]) if alone else start + rank
            start = max(numbers[layer] for layer in found[stack]) + 1
    return numbers


def _towers(shapes: Shapes, kinds: Mapping[str, _Kind]) -> dict[str, str]:
    """The tower of each tensor; ``language`` only where there are words."""
    towers = {name: kind.place.tower for name, kind in kinds.items()}
    rest = [name for name, tower in towers.items() if tower == "language"]
    if not any(map(_is_text, rest)):
        known = {tower for tower in towers.values() if tower in ("vision", "audio")}
        kind = _senses(shapes, rest)
        if len(known) == 1 and (kind is not None or all(_CODER.search(name) for name in rest if kinds[name].stack)):
            (kind,) = known
        if kind is not None:
            return {name: kind if tower == "language" else tower for name, tower in towers.items()}
    coders: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in rest:
        if coder := _CODER.search(name):
            coders[name[: coder.start()]][coder[1]].append(name)
    for prefix, sides in coders.items():
        beside = [name for name in rest if name.startswith(prefix) and not _CODER.search(name)]
        reads = any(_VOCABULARY.search(name) and not _WORDS.search(name) for name in beside)
        senses = {side: None if reads else _senses(shapes, names) for side, names in sides.items()}
        of_text = [
            side for side, names in sides.items() if not senses[side] and any(kinds[name].stack for name in names)
        ]
        for side, names in sides.items():
            words = side if len(of_text) == 2 else "language"
            towers.update(dict.fromkeys(names, senses[side] or words))
    return towers


def _is_text(name: str) -> bool:
    return _VOCABULARY.search(name) is not None or _WORDS.search(name) is not None


def _senses(shapes: Shapes, names: Sequence[str]) -> str | None:
    """Whether tensors are those of a model of images or of sound, as the shapes of its convolutions say."""
    if any(map(_is_text, names)):
        return None
    weights = {name: shapes[name] for name in names if _WEIGHT.search(name) and len(shapes[name]) > 2}
    if any(len(shape) > 3 and shape[1] == 3 for shape in weights.values()):
        return "vision"
    patches = [shapes[name] for name in names if _IMAGES.search(name)]
    if patches:
        return "audio" if any(len(patch) > 3 and patch[1] == 1 for patch in patches) else "vision"
    of_one_dimension = (name for name, shape in weights.items() if len(shape) == 3)
    if any(map(_SOUND.search, names)) or any(
        locate(name, 3).block in ("conv", "embedding") for name in of_one_dimension
    ):
        return "audio"
    return "vision" if any(len(shape) > 3 for shape in weights.values()) else None
