"""Which tensor of one checkpoint is compared with which tensor of the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ckptdiff.checkpoint.checkpoint import Checkpoint
from ckptdiff.checkpoint.dtypes import Kind
from ckptdiff.checkpoint.globs import Globs
from ckptdiff.checkpoint.header import TensorInfo
from ckptdiff.checkpoint.matching import match_names
from ckptdiff.checkpoint.ties import tied_embedding, twice_named
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
    """

    name: str
    of: str
    side: Literal["base", "tuned", "both"]


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
    """

    pairs: tuple[TensorPair, ...]
    only_in_base: tuple[str, ...]
    only_in_tuned: tuple[str, ...]
    aliased: tuple[Alias, ...]
    mismatched: tuple[Mismatch, ...]
    warnings: tuple[str, ...]


def pair(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    renames: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Pairing:
    """Pair the tensors of two checkpoints.

    Names are matched first as they are, after `renames`; then, for what is left, without the prefixes that wrap
    whole models (``module.``, ``_orig_mod.``, ``base_model.model.``, ``model.language_model.``, ...), where exactly
    one name on each side remains. Nothing else is guessed.

    Parameters
    ----------
    base, tuned : Checkpoint
        The two sides.
    renames : sequence of str
        ``OLD=NEW`` substitutions on the base's names, as regular expressions, applied in order.
    include, exclude : sequence of str
        Shell-style patterns on the base's or the tuned side's name. Without `include` everything is included;
        `exclude` wins. What they leave out appears nowhere in the result.

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
    """
    globs = Globs(include, exclude)
    matched, match_warnings = match_names(base.tensors, tuned.tensors, renames)
    everything = _sort_out(base, tuned, matched)
    selected = _select(everything, globs)
    if not selected.pairs:
        raise _nothing_to_compare(base, tuned, everything, selected)
    warnings = (
        *match_warnings,
        *globs.unmatched([*base.tensors, *tuned.tensors]),
        *_tie_warnings(selected.aliased),
        *_scale_warnings(base, tuned, selected.pairs),
    )
    return replace(selected, warnings=warnings)


def _sort_out(base: Checkpoint, tuned: Checkpoint, matched: dict[str, str]) -> Pairing:
    pairs: list[TensorPair] = []
    mismatched: list[Mismatch] = []
    aliased: list[Alias] = []
    seen: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}
    for name, ours in base.tensors.items():
        if name not in matched:
            continue
        theirs = tuned.tensors[matched[name]]
        reason = _mismatch(ours, theirs)
        if reason is not None:
            mismatched.append(Mismatch(name, ours, theirs, reason))
            continue
        # Empty tensors have equal regions without being the same tensor.
        first = seen.setdefault((ours.region, theirs.region), name) if ours.nbytes else name
        if first == name:
            pairs.append(TensorPair(name, ours, theirs))
        else:
            aliased.append(Alias(name, first, "both"))
    only_in_base, base_aliases = _unmatched(base, tuned, set(matched), "base")
    only_in_tuned, tuned_aliases = _unmatched(tuned, base, set(matched.values()), "tuned")
    return Pairing(
        tuple(pairs),
        only_in_base,
        only_in_tuned,
        (*aliased, *base_aliases, *tuned_aliases),
        tuple(mismatched),
        (),
    )


def _mismatch(base: TensorInfo, tuned: TensorInfo) -> str | None:
    if base.shape != tuned.shape:
        return f"shapes differ: {list(base.shape)} in base, {list(tuned.shape)} in tuned"
    if base.dtype != tuned.dtype and not (base.kind is tuned.kind is Kind.FLOAT):
        return f"dtypes cannot be compared: {base.dtype} in base, {tuned.dtype} in tuned"
    return None


def _unmatched(
    storing: Checkpoint, lacking: Checkpoint, matched: set[str], side: Literal["base", "tuned"]
) -> tuple[tuple[str, ...], tuple[Alias, ...]]:
    alone = [name for name in storing.tensors if name not in matched]
    again = twice_named(storing.tensors.values()) if alone else {}
    only: list[str] = []
    aliased: list[Alias] = []
    for name in alone:
        of = again.get(name) or tied_embedding(name, storing.tensors, lacking.tensors)
        if of is None:
            only.append(name)
        else:
            aliased.append(Alias(name, of, side))
    return tuple(only), tuple(aliased)


def _select(pairing: Pairing, globs: Globs) -> Pairing:
    return Pairing(
        pairs=tuple(pair for pair in pairing.pairs if globs.select(pair.base.name, pair.tuned.name)),
        only_in_base=tuple(name for name in pairing.only_in_base if globs.select(name)),
        only_in_tuned=tuple(name for name in pairing.only_in_tuned if globs.select(name)),
        aliased=tuple(alias for alias in pairing.aliased if globs.select(alias.name)),
        mismatched=tuple(
            mismatch for mismatch in pairing.mismatched if globs.select(mismatch.name, mismatch.tuned.name)
        ),
        warnings=pairing.warnings,
    )


def _nothing_to_compare(base: Checkpoint, tuned: Checkpoint, everything: Pairing, selected: Pairing) -> PairingError:
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
        hint="rename the base's tensors with --map 'OLD=NEW', for example --map '^encoder\\.=model.'"
        if adapter is None
        else f"{adapter.path} is an adapter: merge it into its model first (merge_and_unload of peft), and save that",
    )


def _tie_warnings(aliased: Iterable[Alias]) -> list[str]:
    return [
        f"{alias.name} is stored only in {alias.side}: taken as tied to {alias.of}, its values not compared"
        for alias in aliased
        if alias.side != "both"
    ]


def _scale_warnings(base: Checkpoint, tuned: Checkpoint, pairs: Iterable[TensorPair]) -> list[str]:
    base_scales, tuned_scales = _scaled_modules(base), _scaled_modules(tuned)
    if not base_scales and not tuned_scales:
        return []
    count = sum(_is_scaled(pair.base, base_scales) or _is_scaled(pair.tuned, tuned_scales) for pair in pairs)
    if not count:
        return []
    return [f"{count} fp8 tensors have scales beside them: compared as raw codes, unscaled"]


def _scaled_modules(checkpoint: Checkpoint) -> set[str]:
    split = (name.rpartition(".") for name in checkpoint.tensors if "scale" in name)
    return {module for module, _, parameter in split if "scale" in parameter}


def _is_scaled(tensor: TensorInfo, scaled_modules: set[str]) -> bool:
    is_fp8 = tensor.kind is Kind.FLOAT and tensor.dtype.startswith("F8_")
    return is_fp8 and (tensor.name.rpartition(".")[0] in scaled_modules or tensor.name in scaled_modules)
