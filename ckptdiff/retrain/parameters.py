"""Hold the masks of a model's parameters, and make others of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
from torch.nn import Parameter

from ckptdiff.checkpoint.globs import names_of
from ckptdiff.errors import MaskError, first_few, plural
from ckptdiff.report.text import percent
from ckptdiff.retrain.packed import PackedMask, require_fit

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class MatchReport:
    """How the masks of a run file and the parameters of a model found each other.

    Attributes
    ----------
    matched : mapping of str to str
        Name in the run file to name in the model; of several copies that PEFT keeps, one that is trained. A mask whose
        tensor the model has in several parameters has all their names, with commas.
    unused_masks : tuple of str
        Masks with coordinates for which the model has no parameter.
    unmasked_parameters : tuple of str
        Trainable parameters without a mask for some or all of their coordinates; masked optimizers leave these as they
        are.
    frozen : tuple of str
        Masks of parameters that do not require a gradient: nothing of them is trained.
    buffers : tuple of str
        Masks of what is a buffer in the model, which no optimizer moves.
    warnings : tuple of str
        Names that fit more than one parameter, and what could not be put together.
    coordinates : int
        In all masks.
    left_out : int
        Of these, in masks without a parameter that is trained.
    """

    matched: Mapping[str, str]
    unused_masks: tuple[str, ...] = ()
    unmasked_parameters: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    coordinates: int = 0
    left_out: int = 0

    @property
    def complete(self) -> bool:
        """Whether every mask has its parameter and every trainable parameter its mask."""
        return not (self.unused_masks or self.unmasked_parameters)

    @property
    def whole(self) -> bool:
        """Whether it is complete, and every coordinate in a mask is trained."""
        return self.complete and not self.left_out

    def __str__(self) -> str:
        lines = [f"{plural(len(self.matched), 'mask')} matched"]
        for noun, where, names in (
            ("mask", "without a parameter", self.unused_masks),
            ("parameter", "without a mask", self.unmasked_parameters),
            ("mask", "of parameters that do not require a gradient", self.frozen),
            ("mask", "of buffers", self.buffers),
        ):
            if names:
                lines.append(f"{plural(len(names), noun)} {where}: {first_few(names, _SHOWN)}")
        if self.left_out:
            lines.append(f"{percent(self.left_out / self.coordinates)} of the masks' coordinates are left out")
        return "; ".join([*lines, *self.warnings])


class ParameterMasks(Mapping[Parameter, PackedMask]):
    """Parameter to mask; parameters that are not in it are wholly frozen.

    Parameters
    ----------
    masks : mapping of Parameter to PackedMask
    names : mapping of Parameter to str
        What they are called, however the model is wrapped: their names in the run file, or, where the run has them in
        other pieces, in the model.
    report : MatchReport, optional
        How the masks were found.

    Raises
    ------
    MaskError
        What is no packed mask, or one of another shape than its parameter.

    Examples
    --------
    >>> from ckptdiff.retrain import load_masks
    >>> masks = load_masks("run.h5", model)
    >>> masks.random(0).count == masks.count, (masks - masks).count
    (True, 0)
    >>> len(masks.only("*.mlp.*"))
    12
    """

    def __init__(
        self,
        masks: Mapping[Parameter, PackedMask],
        names: Mapping[Parameter, str],
        report: MatchReport | None = None,
    ) -> None:
        self._masks: dict[Parameter, PackedMask] = dict(masks)
        self.names = {parameter: names[parameter] for parameter in self._masks}
        self.report = report or MatchReport({})
        for parameter, mask in self._masks.items():
            require_fit(mask, tuple(parameter.shape), self.names[parameter])

    def __getitem__(self, parameter: Parameter) -> PackedMask:
        return self._masks[parameter]

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    @property
    def count(self) -> int:
        """Coordinates in the masks."""
        return sum(mask.count for mask in self._masks.values())

    @property
    def density(self) -> float:
        """Share of the coordinates of all parameters here that are in the masks."""
        return self.count / max(1, sum(mask.numel for mask in self._masks.values()))

    def inverted(self) -> ParameterMasks:
        """The complement of each mask; parameters without a mask stay frozen."""
        return self._each(lambda mask, _: mask.inverted())

    def random(self, seed: int) -> ParameterMasks:
        """Random masks with as many coordinates in each parameter; the draw depends on seed and names alone."""
        return self._each(lambda mask, name: mask.shuffled(np.random.default_rng([seed, zlib.crc32(name.encode())])))

    def only(self, *patterns: str) -> ParameterMasks:
        """The masks of parameters that some of `names`, or globs of them, stand for; the others are frozen.

        Raises
        ------
        MaskError
            A pattern that matches no parameter.
        """
        found = names_of(patterns, self.names.values())
        for pattern, matches in found.items():
            if not matches:
                raise MaskError(
                    "no masked parameter of that name",
                    expected=f"one of {first_few(self.names.values())}",
                    found=pattern,
                    hint="names are those in the run file: ckptdiff mask list shows them",
                )
        wanted = set(chain.from_iterable(found.values()))
        kept = {parameter: mask for parameter, mask in self._masks.items() if self.names[parameter] in wanted}
        return ParameterMasks(kept, self.names, self.report)

    def __or__(self, other: ParameterMasks) -> ParameterMasks:
        empty = {p: PackedMask(m.shape, np.zeros_like(m.bits)) for p, m in {**self._masks, **other._masks}.items()}
        combined = {p: self.get(p, none) | other.get(p, none) for p, none in empty.items()}
        return ParameterMasks(combined, {**other.names, **self.names}, self.report)

    def __and__(self, other: ParameterMasks) -> ParameterMasks:
        combined = {parameter: mask & other[parameter] for parameter, mask in self._masks.items() if parameter in other}
        return ParameterMasks(combined, self.names, self.report)

    def __sub__(self, other: ParameterMasks) -> ParameterMasks:
        combined = {p: mask - other[p] if p in other else mask for p, mask in self._masks.items()}
        return ParameterMasks(combined, self.names, self.report)

    def _each(self, change: Callable[[PackedMask, str], PackedMask]) -> ParameterMasks:
        changed = {parameter: change(mask, self.names[parameter]) for parameter, mask in self._masks.items()}
        return ParameterMasks(changed, self.names, self.report)
