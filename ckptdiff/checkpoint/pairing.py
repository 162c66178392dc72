"""Choose which tensor of one checkpoint is compared with which tensor of the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from ckptdiff.checkpoint.checkpoint import Checkpoint
from ckptdiff.checkpoint.dtypes import Kind
from ckptdiff.checkpoint.encodings import MAY_BE_CODES, is_packed, is_scaled, scaled_modules
from ckptdiff.checkpoint.foreign import foreign_codes
from ckptdiff.checkpoint.globs import Globs
from ckptdiff.checkpoint.layouts import Assembly, assemble, orders_by_name, reopened
from ckptdiff.checkpoint.matching import is_adapter_part, match_names
from ckptdiff.checkpoint.names import locate
from ckptdiff.checkpoint.nothing_in_common import MERGE, nothing_to_compare
from ckptdiff.checkpoint.pairs import Alias, CommonRows, Mismatch, Pairing, TensorPair, first_rows
from ckptdiff.checkpoint.renames import parse_renames, rename_all
from ckptdiff.checkpoint.side_weights import SideWeights, weights_of
from ckptdiff.checkpoint.suggested_map import Agreement, suggest_map
from ckptdiff.checkpoint.ties import SameValues, find_ties, left_embedding
from ckptdiff.checkpoint.weights import Assembled, CommonPart, Source
from ckptdiff.errors import plural
from ckptdiff.options import Values

__all__ = ["Alias", "CommonRows", "Mismatch", "Pairing", "TensorPair", "pair"]

_MADE = Assembled, CommonPart
"""Sides that are no one weight."""


def pair(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    renames: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    same_values: SameValues | None = None,
    values: Values = "codes",
    agreement: Agreement | None = None,
) -> Pairing:
    """Pair the weights of two checkpoints.

    Names are matched first as they are, after `renames`; then, for what is left, without the prefixes that wrap
    whole models (``module.``, ``_orig_mod.``, ``base_model.model.``, ``model.language_model.``, ...), where exactly
    one name on each side remains; then what is stored in other pieces on the other side is put together of these
    (:mod:`~ckptdiff.checkpoint.layouts`). Nothing else is guessed. A head that one side lacks is tied to an embedding
    of its own side if their values are equal, or if they cannot be looked at and ``config.json`` says so; else, if the
    other side's ``config.json`` says that it ties its own, it is compared with the embedding that it has left.

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
        it no data is read; a head may then be a pair of its own that is an alias where its values are looked at.
    values : {"model", "codes"}
        Whether quantised weights are decoded, or codes and scales are tensors like any other.
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
    sides = weights_of(base, values), weights_of(tuned, values)
    matched, match_warnings = match_names(sides[0].named, sides[1].named, renames)
    renamed, _ = rename_all(sides[0].named, parse_renames(renames))
    pairing = _sort_out(sides, matched, renamed, globs, same_values)
    suggested = suggest_map(
        base,
        tuned,
        matched,
        [name for name in pairing.only_in_base if name in base.tensors],
        [name for name in pairing.only_in_tuned if name in tuned.tensors],
        renames=renames,
        agreement=agreement,
    )
    if not pairing.pairs:
        everything = _sort_out(sides, matched, renamed, Globs(), None)
        everything = replace(everything, warnings=(*sides[0].warnings, *sides[1].warnings, *everything.warnings))
        raise nothing_to_compare(base, tuned, everything, pairing, suggested)
    warnings = (
        *match_warnings,
        *globs.unmatched([*sides[0].named, *sides[1].named], [*base.tensors, *tuned.tensors]),
        *sides[0].warnings,
        *sides[1].warnings,
        *pairing.warnings,
        *_adapter_warnings(base, tuned, pairing),
        *(f"{side.path} is {codes}" for side in (base, tuned) if (codes := foreign_codes(side.tensors))),
        *_scale_warnings(base, tuned, pairing.pairs),
        *suggested.warnings,
    )
    return replace(pairing, warnings=warnings, suggested=suggested)


def _sort_out(
    sides: tuple[SideWeights, SideWeights],
    matched: dict[str, str],
    renamed: Mapping[str, str],
    globs: Globs,
    same_values: SameValues | None,
) -> Pairing:
    """Put every weight that the globs select in its place."""
    base, tuned = sides
    assembly = _assembly(base.named, tuned.named, matched, renamed)
    found = assembly.assembled
    matched = {name: other for name, other in matched.items() if name not in found} | assembly.renamed
    others: dict[str, tuple[str, ...]] = {name: (other,) for name, other in matched.items()}
    others |= {name: tuple(weight.taken) for name, weight in found.items()}
    chosen = {name: others[name] for name in base.named if name in others and globs.select(name, *others[name])}
    excluded = others.keys() - chosen.keys()
    sources: dict[str, tuple[Source, Source | Assembled]] = {
        name: (base.named[name], found.get(name) or tuned.named[matched[name]]) for name in chosen
    }
    pairs, mismatched = _compared(sources)
    used = {other for theirs in others.values() for other in theirs}
    # Without a pair this ends in an error, and there is no need to read anything.
    asked = same_values if pairs else None
    in_base, base_ties, base_warnings = _without_counterpart(base, "base", others, chosen, globs, asked)
    in_tuned, tuned_ties, tuned_warnings = _without_counterpart(
        tuned, "tuned", used, [matched[name] for name in chosen if name in matched], globs, asked
    )
    untied = [
        *_untied(base, tuned, in_base, lambda head, embedding: (head, embedding)),
        *_untied(tuned, base, in_tuned, lambda head, embedding: (embedding, head)),
    ]
    left = {pair.name for pair in untied}
    of_base = _sizes(base, excluded | {name for name in base.named if name not in others and not globs.select(name)})
    of_tuned = _sizes(tuned, {name for name in tuned.named if name not in used and not globs.select(name)})
    of_tuned.update(_sizes(tuned, {matched[name] for name in excluded if name in matched}))
    for name in excluded & found.keys():
        of_tuned.update(found[name].taken)
    return Pairing(
        pairs=(*pairs, *untied),
        only_in_base=tuple(name for name in in_base if name not in left),
        only_in_tuned=tuple(name for name in in_tuned if name not in left),
        aliased=(*base_ties, *tuned_ties),
        mismatched=tuple(mismatched),
        warnings=(*assembly.warnings, *base_warnings, *tuned_warnings),
        weights=(base.named, tuned.named),
        excluded=(of_base, of_tuned),
        orders=assembly.orders
        | orders_by_name(
            (one.base, one.tuned)
            for one in pairs
            if not isinstance(one.base, _MADE) and not isinstance(one.tuned, _MADE)
        ),
    )


def _compared(sources: Mapping[str, tuple[Source, Source | Assembled]]) -> tuple[list[TensorPair], list[Mismatch]]:
    """Tell what can be compared of the weights that belong together."""
    pairs: list[TensorPair] = []
    mismatched: list[Mismatch] = []
    for name, (base, tuned) in sources.items():
        if isinstance(tuned, Assembled):
            pairs.append(_assembled_pair(name, base, tuned))
            continue
        reason = _mismatch(base, tuned)
        if reason is None:
            pairs.append(TensorPair(name, base, tuned))
        elif (common := _common_rows(name, base, tuned)) is not None:
            pairs.append(common)
        else:
            mismatched.append(Mismatch(name, base, tuned, reason))
    return pairs, mismatched


def _assembled_pair(name: str, base: Source, tuned: Assembled) -> TensorPair:
    region = tuned.region
    if region.numel == base.numel:
        return TensorPair(name, base, tuned)
    return TensorPair(name, CommonPart(base, region), CommonPart(tuned, region))


def _sizes(side: SideWeights, names: Collection[str]) -> Counter[str]:
    return Counter({name: weight.numel for name, weight in side.named.items() if name in names} if names else {})


def _assembly(
    base: Mapping[str, Source], tuned: Mapping[str, Source], matched: Mapping[str, str], renamed: Mapping[str, str]
) -> Assembly:
    """Put together what has no counterpart of its name, or one in another layout."""
    again = reopened((base[name], tuned[other]) for name, other in matched.items())
    kept = {name: other for name, other in matched.items() if name not in again}
    taken = set(kept.values())
    return assemble(
        {renamed[name]: weight for name, weight in base.items() if name not in kept},
        {name: weight for name, weight in tuned.items() if name not in taken},
    )


def _untied(
    storing: SideWeights,
    other: SideWeights,
    alone: Sequence[str],
    ordered: Callable[[Source, Source], tuple[Source, Source]],
) -> Iterator[TensorPair]:
    """Heads that one side alone stores, each with the embedding that it is on the other side."""
    for name in alone:
        head = storing.named[name]
        embedding = left_embedding(head, other.checkpoint, other.named.values())
        if embedding is None:
            continue
        sides = ordered(head, embedding)
        pair = TensorPair(name, *sides) if head.shape == embedding.shape else _common_rows(name, *sides)
        if pair is not None:
            yield replace(pair, untied=True)


def _without_counterpart(
    storing: SideWeights,
    side: Literal["base", "tuned"],
    known: Collection[str],
    compared: Iterable[str],
    globs: Globs,
    same_values: SameValues | None,
) -> tuple[tuple[str, ...], tuple[Alias, ...], tuple[str, ...]]:
    """Names that one side lacks, those among them that are tied to another tensor, and warnings."""
    alone = [name for name in storing.named if name not in known and globs.select(name)]
    stored = storing.checkpoint.tensors
    ties = find_ties(
        storing.checkpoint,
        [name for name in compared if name in stored],
        [name for name in alone if name in stored],
        side,
        same_values,
    )
    only = tuple(name for name in alone if name not in ties.found)
    return only, tuple(Alias(name, tie.of, side, tie.by) for name, tie in ties.found.items()), ties.warnings


def _mismatch(base: Source, tuned: Source) -> str | None:
    if base.shape != tuned.shape:
        return f"shapes differ: {list(base.shape)} in base, {list(tuned.shape)} in tuned"
    if base.dtype != tuned.dtype and not (base.kind is tuned.kind is Kind.FLOAT):
        return f"dtypes cannot be compared: {base.dtype} in base, {tuned.dtype} in tuned"
    return None


def _common_rows(name: str, base: Source, tuned: Source) -> TensorPair | None:
    """The rows that two embeddings or heads have in common: the first ones, as tokens are added at the end."""
    of_vocabulary = locate(name).module_type in ("embed_tokens", "lm_head") and len(base.shape) == len(tuned.shape) > 0
    if not of_vocabulary or base.shape[1:] != tuned.shape[1:] or not base.kind is tuned.kind is Kind.FLOAT:
        return None
    common = min(base.shape[0], tuned.shape[0])
    rows = CommonRows(common, base.shape[0] - common, tuned.shape[0] - common)
    return TensorPair(name, first_rows(base, common), first_rows(tuned, common), rows) if common else None


def _adapter_warnings(base: Checkpoint, tuned: Checkpoint, pairing: Pairing) -> Iterator[str]:
    for side, only in ((base, pairing.only_in_base), (tuned, pairing.only_in_tuned)):
        if any(map(is_adapter_part, only)):
            yield f"{side.path} holds an adapter that is not merged, and what it changes is not compared: {MERGE}"


def _scale_warnings(base: Checkpoint, tuned: Checkpoint, pairs: Iterable[TensorPair]) -> list[str]:
    scales = scaled_modules(base.tensors), scaled_modules(tuned.tensors)
    pairs = [pair for pair in pairs if pair.base.dtype in MAY_BE_CODES or pair.tuned.dtype in MAY_BE_CODES]
    kinds = {
        ("fp8 tensor has scales beside it", "fp8 tensors have scales beside them"): is_scaled,
        ("tensor holds packed codes", "tensors hold packed codes"): is_packed,
    }
    counts = {
        what: sum(of_kind(pair.base, scales[0]) or of_kind(pair.tuned, scales[1]) for pair in pairs)
        for what, of_kind in kinds.items()
    }
    return [f"{plural(count, *what)}: compared as raw codes, unscaled" for what, count in counts.items() if count]
