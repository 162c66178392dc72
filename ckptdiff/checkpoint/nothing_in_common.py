"""Say why two checkpoints have no pair to compare, and what can be done."""

from __future__ import annotations

from ckptdiff.checkpoint.checkpoint import Checkpoint
from ckptdiff.checkpoint.foreign import foreign_codes
from ckptdiff.checkpoint.matching import is_adapter_part
from ckptdiff.checkpoint.pairs import Pairing
from ckptdiff.checkpoint.suggested_map import SuggestedMap
from ckptdiff.errors import PairingError, first_few

__all__ = ["MERGE", "nothing_to_compare"]

_RENAME = "rename the base's tensors with --map 'OLD=NEW', a regular expression"
MERGE = "merge it into its model first (merge_and_unload of peft), and save that"
"""What can be done about an adapter."""


def nothing_to_compare(
    base: Checkpoint, tuned: Checkpoint, everything: Pairing, selected: Pairing, suggested: SuggestedMap
) -> PairingError:
    """Make the error about two checkpoints without a pair.

    Parameters
    ----------
    base, tuned : Checkpoint
    everything, selected : Pairing
        Without globs, and with those of the user. A warning of the former may say why.
    suggested : SuggestedMap
    """
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
            hint=next(iter(everything.warnings), "check that the two checkpoints are of the same model"),
        )
    foreign = (
        f"{side.path} is {what}"
        for side in (base, tuned)
        if (what := f"an adapter: {MERGE}" if any(map(is_adapter_part, side.tensors)) else foreign_codes(side.tensors))
    )
    return PairingError(
        "the two checkpoints have no tensor name in common",
        file=tuned.path,
        expected=f"names as in {base.path}: {first_few(base.tensors) or 'none'}",
        found=first_few(tuned.tensors) or "none",
        hint=next(foreign, None) or suggested.advice or next(iter(everything.warnings), None) or _RENAME,
    )
