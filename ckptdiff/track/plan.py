"""Find the tensors of a base that can be followed through its later checkpoints, and how each is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import Checkpoint, Kind, TensorInfo, open_checkpoint, pair
from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.checkpoint.same_values import look_for_ties
from ckptdiff.errors import OptionError, PairingError, first_few, plural
from ckptdiff.events import Listener, ignore
from ckptdiff.formats import FORMATS, Format, compare_format, stored_format
from ckptdiff.measure.cpu import cast_of
from ckptdiff.options import Compare


@dataclass(frozen=True, slots=True)
class Followed:
    """One tensor through all checkpoints."""

    sides: tuple[TensorInfo, ...]
    """The base, then every step."""
    compare: Format
    """What all of them are cast to."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Dtype of each side."""
        return tuple(side.dtype for side in self.sides)

    @property
    def code_dtype(self) -> np.dtype[np.unsignedinteger]:
        """Dtype of codes; those of 8 bits are widened."""
        return max(self.compare.code_dtype, np.dtype(np.uint16))

    def casts(self) -> tuple[tuple[int, ...], NDArray[np.unsignedinteger]]:
        """How each side becomes codes, and the tables for it, of shape (sides, 0 or 65536)."""
        return _casts(self.dtypes, self.compare, self.code_dtype)


@cache
def _casts(
    dtypes: tuple[str, ...], compare: Format, code: np.dtype[np.unsignedinteger]
) -> tuple[tuple[int, ...], NDArray[np.unsignedinteger]]:
    found = [cast_of(stored_format(dtype), compare) for dtype in dtypes]
    size = 1 << 16 if any(table.size for _, table in found) else 0
    tables = np.zeros((len(found), size), code)
    for row, (_, table) in zip(tables, found, strict=True):
        row[: table.size] = table
    return tuple(int(cast) for cast, _ in found), tables


@dataclass(frozen=True, slots=True)
class TrackPlan:
    """All tensors to be followed, and where they lie."""

    base: Checkpoint
    steps: tuple[Checkpoint, ...]
    tensors: tuple[Followed, ...]
    """In the order of the base's files."""
    warnings: tuple[str, ...]


def plan_track(
    base: str | os.PathLike[str],
    steps: Sequence[str | os.PathLike[str]],
    *,
    compare: Compare = "bf16",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tell: Listener = ignore,
    stream: bool = False,
) -> TrackPlan:
    """Open all checkpoints and find the floating tensors that every one of them has, by the names of the base.

    Parameters are those of :func:`~ckptdiff.track.follow.track`.

    Raises
    ------
    OptionError
        No step.
    CheckpointError
        A checkpoint that cannot be read.
    PairingError
        A step that has no tensor of the base, or no floating tensor that all steps have.
    """
    opened = open_checkpoint(base, stream)
    if not steps:
        raise OptionError("nothing to follow: name a base and at least one later checkpoint")
    later = tuple(open_checkpoint(step, stream) for step in steps)
    warnings: dict[str, None] = dict.fromkeys(opened.warnings)
    with open_shards("pread") as shards:
        # The base's head is looked at once, however many steps lack it.
        known = cache(look_for_ties(shards, tell))
        how = partial(pair, include=include, exclude=exclude, same_values=known, values="model")
        pairings = [how(opened, step) for step in later]
    for step, pairing in zip(later, pairings, strict=True):
        warnings |= dict.fromkeys((*step.warnings, *pairing.warnings))
        left_out = [*pairing.only_in_base, *(bad.name for bad in pairing.mismatched)]
        if left_out:
            lacking = f"lacks {plural(len(left_out), 'tensor')} of the base, or has other shapes: {first_few(left_out)}"
            warnings[f"{step.path} {lacking}"] = None
        unlike = [matched.name for matched in pairing.pairs if not matched.stored]
        if unlike:
            why = "as only whole stored tensors are followed, and not pieces, quantised weights or common rows"
            warnings[f"{step.path}: {plural(len(unlike), 'tensor')} left out, {why}: {first_few(unlike)}"] = None
    counterparts = [
        {
            matched.name: matched.tuned
            for matched in pairing.pairs
            if isinstance(matched.tuned, TensorInfo) and matched.stored
        }
        for pairing in pairings
    ]
    followed: list[Followed] = []
    bitwise = 0
    for name in counterparts[0]:
        if not all(name in names for names in counterparts):
            continue
        tensor = opened.tensors[name]
        if tensor.kind is not Kind.FLOAT:
            bitwise += 1
            continue
        sides = (tensor, *(names[name] for names in counterparts))
        followed.append(Followed(sides, _common(tuple(side.dtype for side in sides), compare)))
    if bitwise:
        warnings[f"{plural(bitwise, 'tensor')} of integers or opaque codes left out"] = None
    if not followed:
        raise PairingError(
            "no floating tensor is in all checkpoints",
            file=opened.path,
            expected="tensors of the same names and shapes in the base and every step",
            found=next(iter(warnings), "none"),
        )
    return TrackPlan(opened, later, tuple(followed), tuple(warnings))


@cache
def _common(dtypes: tuple[str, ...], compare: Compare) -> Format:
    """One compare format for all sides, so that steps can be compared with each other."""
    formats = [stored_format(dtype) for dtype in dtypes]
    common = formats[0]
    for format in formats[1:]:
        common = compare_format(common, format, "stored")
    return common if compare == "stored" or (len({*formats}) == 1 and common.bits == 8) else FORMATS["bf16"]
