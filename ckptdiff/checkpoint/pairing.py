"""Choose which tensor of one checkpoint is compared with which tensor of the other."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ckptdiff.checkpoint.checkpoint import Checkpoint
from ckptdiff.checkpoint.dtypes import Kind
from ckptdiff.checkpoint.globs import Globs
from ckptdiff.checkpoint.header import TensorInfo
from ckptdiff.checkpoint.matching import match_names
from ckptdiff.checkpoint.scales import is_scaled, scaled_modules
from ckptdiff.checkpoint.suggested_map import Agreement, SuggestedMap, suggest_map
from ckptdiff.checkpoint.ties import Evidence, SameValues, find_ties
from ckptdiff.errors import PairingError, first_few

__all__ = ["Alias", "Mismatch", "Pairing", "TensorPair", "pair"]


@dataclass(frozen=True, slots=True)
class TensorPair:
    """Two tensors to compare.

    Attributes
    ----------
    name : str
        The base's name, by which every report calls the pair.
    base, tuned : TensorInfo
        The two sides: equal shapes; both `FLOAT`, or the same dtype.
    """

    name: str
    base: TensorInfo
    tuned: TensorInfo

    @property
    def tuned_name(self) -> str | None:
        """The tuned side's name, or None where it is the base's."""
        return None if self.tuned.name == self.name else self.tuned.name

    @property
    def same_bytes(self) -> bool:
        """Whether both sides are the same bytes of the same file, so that they are read once."""
        return self.base.region == self.tuned.region


@dataclass(frozen=True, slots=True)
class Alias:
    """A tensor that is another one under a second name, and so is counted once.

    Attributes
    ----------
    name : str
        The tensor that is not compared on its own.
    of : str
        The tensor that stands for it, in the same checkpoint.
    side : {"base", "tuned", "both"}
        Which checkpoint stores it under that name.
    by : {"bytes", "values", "config"}
        How that is known: the same bytes of a file, a look at all values, or ``config.json``, which may be wrong.
    """

    name: str
    of: str
    side: Literal["base", "tuned", "both"]
    by: Evidence


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Two tensors that belong together and cannot be compared.

    Attributes
    ----------
    name : str
        The base's name.
    base, tuned : TensorInfo
        The two sides.
    reason : str
        Why not, in words.
    """

    name: str
    base: TensorInfo
    tuned: TensorInfo
    reason: str


@dataclass(frozen=True, slots=True)
class Pairing:
    """Every tensor of two checkpoints, each in one place.

    Attributes
    ----------
    pairs : tuple of TensorPair
        What is compared, in the order of the base's files.
    only_in_base, only_in_tuned : tuple of str
        Names without a counterpart, in their own checkpoint's order.
    aliased : tuple of Alias
        Names that stand for another tensor.
    mismatched : tuple of Mismatch
        Counterparts that cannot be compared.
    warnings : tuple of str
        What the user should know about the pairing.
    suggested : SuggestedMap
        Rules for ``--map`` that would pair more.
    """

    pairs: tuple[TensorPair, ...]
    only_in_base: tuple[str, ...]
    only_in_tuned: tuple[str, ...]
    aliased: tuple[Alias, ...]
    mismatched: tuple[Mismatch, ...]
    warnings: tuple[str, ...]
    suggested: SuggestedMap = field(default_factory=SuggestedMap)


def pair(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    renames: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    same_values: SameValues | None = None,
    agreement: Agreement | None = None,
) -> Pairing:
    """Pair the tensors of two checkpoints.

    Names are matched first as they are, after `renames`; then, for what is left, without the prefixes that wrap
    whole models (``module.``, ``_orig_mod.``, ``base_model.model.``, ``model.language_model.``, ...), where exactly
    one name on each side remains. Nothing else is guessed. A head that one side lacks is tied to an embedding of its
    own side if their values are equal, or if they cannot be looked at and ``config.json`` says so.

    Parameters
    ----------
    base, tuned : Checkpoint
        The two sides.
    renames : sequence of str
        ``OLD=NEW`` substitutions on the base's names, as regular expressions, applied in order.
    include, exclude : sequence of str
        Shell-style patterns on the base's or the tuned side's name. Without `include` everything is included;
        `exclude` wins. What they leave out appears nowhere in the result, nor does anything that is tied to it.
    same_values : callable, optional
        Tells whether two tensors hold the same values (:func:`~ckptdiff.checkpoint.same_values.same_values`). Without
        it no data is read; the pairs are the same.
    agreement : callable, optional
        Samples two tensors, where suggested rules contradict each other.

    Returns
    -------
    Pairing
        Every remaining tensor of both sides, each in one place.

    Raises
    ------
    OptionError
        A rename that cannot be used, or that gives two tensors one name.
    PairingError
        No pair to compare.
    CheckpointError
        A head or an embedding that cannot be read.
    """
    globs = Globs(include, exclude)
    matched, match_warnings = match_names(base.tensors, tuned.tensors, renames)
    pairing = _sort_out(base, tuned, matched, globs, same_values)
    suggested = suggest_map(
        base, tuned, matched, pairing.only_in_base, pairing.only_in_tuned, renames=renames, agreement=agreement
    )
    if not pairing.pairs:
        raise _nothing_to_compare(base, tuned, _sort_out(base, tuned, matched, Globs(), None), pairing, suggested)
    warnings = (
        *match_warnings,
        *globs.unmatched([*base.tensors, *tuned.tensors]),
        *pairing.warnings,
        *_scale_warnings(base, tuned, pairing.pairs),
        *suggested.warnings,
    )
    return replace(pairing, warnings=warnings, suggested=suggested)


def _sort_out(
    base: Checkpoint, tuned: Checkpoint, matched: dict[str, str], globs: Globs, same_values: SameValues | None
) -> Pairing:
    """Put every tensor that the globs select in its place."""
    pairs: list[TensorPair] = []
    mismatched: list[Mismatch] = []
    aliased: list[Alias] = []
    chosen: dict[str, str] = {}
    seen: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}
    for name, one in base.tensors.items():
        if name not in matched or not globs.select(name, matched[name]):
            continue
        chosen[name] = matched[name]
        other = tuned.tensors[matched[name]]
        reason = _mismatch(one, other)
        if reason is not None:
            mismatched.append(Mismatch(name, one, other, reason))
            continue
        # Empty tensors have equal regions without being the same tensor.
        first = seen.setdefault((one.region, other.region), name) if one.nbytes else name
        if first == name:
            pairs.append(TensorPair(name, one, other))
        else:
            aliased.append(Alias(name, first, "both", "bytes"))
    # Without a pair this ends in an error, and there is no need to read anything.
    asked = same_values if pairs else None
    in_base, base_ties, base_warnings = _without_counterpart(base, "base", matched.keys(), chosen.keys(), globs, asked)
    in_tuned, tuned_ties, tuned_warnings = _without_counterpart(
        tuned, "tuned", set(matched.values()), chosen.values(), globs, asked
    )
    return Pairing(
        pairs=tuple(pairs),
        only_in_base=in_base,
        only_in_tuned=in_tuned,
        aliased=(*aliased, *base_ties, *tuned_ties),
        mismatched=tuple(mismatched),
        warnings=(*base_warnings, *tuned_warnings),
    )


def _without_counterpart(
    storing: Checkpoint,
    side: Literal["base", "tuned"],
    known: Collection[str],
    compared: Iterable[str],
    globs: Globs,
    same_values: SameValues | None,
) -> tuple[tuple[str, ...], tuple[Alias, ...], tuple[str, ...]]:
    """Names that one side lacks, those among them that are tied to another tensor, and warnings."""
    alone = [name for name in storing.tensors if name not in known and globs.select(name)]
    ties = find_ties(storing, compared, alone, side, same_values)
    only = tuple(name for name in alone if name not in ties.found)
    return only, tuple(Alias(name, tie.of, side, tie.by) for name, tie in ties.found.items()), ties.warnings


def _mismatch(base: TensorInfo, tuned: TensorInfo) -> str | None:
    if base.shape != tuned.shape:
        return f"shapes differ: {list(base.shape)} in base, {list(tuned.shape)} in tuned"
    if base.dtype != tuned.dtype and not (base.kind is tuned.kind is Kind.FLOAT):
        return f"dtypes cannot be compared: {base.dtype} in base, {tuned.dtype} in tuned"
    return None


def _nothing_to_compare(
    base: Checkpoint, tuned: Checkpoint, everything: Pairing, selected: Pairing, suggested: SuggestedMap
) -> PairingError:
    if everything.pairs and not selected.mismatched:
        alone = (*selected.only_in_base, *selected.only_in_tuned)
        if alone:
            return PairingError(
                "what --include and --exclude leave is in one of the two checkpoints only",
                file=tuned.path,
                expected=f"tensors that are in {base.path} too",
                found=first_few(alone),
                hint="ckptdiff inspect lists the tensors of a checkpoint",
            )
        return PairingError(
            "--include and --exclude leave no tensor to compare",
            file=tuned.path,
            expected=f"some of {len(everything.pairs)} pairs, such as "
            + first_few(pair.name for pair in everything.pairs),
            found="none",
            hint="patterns are shell-style and match whole names: '*.mlp.*', not 'mlp'",
        )
    if selected.mismatched or everything.mismatched:
        first = (selected.mismatched or everything.mismatched)[0]
        return PairingError(
            "no tensor of the two checkpoints can be compared",
            file=tuned.path,
            tensor=first.name,
            expected="some tensors of equal shape and comparable dtype",
            found=first.reason,
            hint="check that the two checkpoints are of the same model",
        )
    adapter = next((side for side in (base, tuned) if any(".lora_A." in name for name in side.tensors)), None)
    return PairingError(
        "the two checkpoints have no tensor name in common",
        file=tuned.path,
        expected=f"names as in {base.path}: {first_few(base.tensors) or 'none'}",
        found=first_few(tuned.tensors) or "none",
        hint=(suggested.advice or "rename the base's tensors with --map 'OLD=NEW', a regular expression")
        if adapter is None
        else f"{adapter.path} is an adapter: merge it into its model first (merge_and_unload of peft), and save that",
    )


def _scale_warnings(base: Checkpoint, tuned: Checkpoint, pairs: Iterable[TensorPair]) -> list[str]:
    base_scales, tuned_scales = scaled_modules(base.tensors), scaled_modules(tuned.tensors)
    if not base_scales and not tuned_scales:
        return []
    count = sum(is_scaled(pair.base, base_scales) or is_scaled(pair.tuned, tuned_scales) for pair in pairs)
    if not count:
        return []
    return [f"{count} fp8 tensors have scales beside them: compared as raw codes, unscaled"]
