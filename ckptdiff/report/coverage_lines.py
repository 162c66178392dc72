"""Say how much of both sides was compared, and what was left out: before any figure of what was."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptdiff.checkpoint.matching import is_adapter_part
from ckptdiff.checkpoint.suggested_map import advice
from ckptdiff.errors import plural
from ckptdiff.figures.coverage import EXCLUDED, by_pattern
from ckptdiff.figures.result import SIDES, Diff, Side
from ckptdiff.report.text import percent, safe

__all__ = ["coverage_lines"]

_LISTED = 3
"""Patterns listed before the rest is only counted; json holds all of them."""


def coverage_lines(diff: Diff) -> list[str]:
    """One line of how much was compared, then one for each group of tensors that was not, the largest first."""
    options = advice(diff.suggested_map)
    return [
        _compared(diff),
        *(line for side in SIDES for line in _left_out(diff, side)),
        *_mismatched(diff),
        *([f"to pair more of them: {safe(options)}"] if options else []),
        *_other_layouts(diff),
    ]


def _compared(diff: Diff) -> str:
    base, tuned = diff.coverage["base"], diff.coverage["tuned"]
    if None in (base.compared, base.values, tuned.compared, tuned.values):
        counted = sum(tensor.compared_of("base") for tensor in diff.tensors)
        return f"compared {counted:,} values; of how many, this run file of an older ckptdiff does not tell"
    of_tuned = f"{tuned.compared:,}" + (f" of {tuned.values:,}" if tuned.compared != tuned.values else "")
    line = f"compared {base.compared:,} of {base.values:,} values of base, {of_tuned} of tuned"
    for side, names in (("base", diff.only_in_base), ("tuned", diff.only_in_tuned)):
        if any(map(is_adapter_part, names)):
            line += f"; the adapter in {side} is not merged"
    return line


def _other_layouts(diff: Diff) -> Iterator[str]:
    """What is compared although the two sides do not store it alike."""
    sizes = diff.columns["numel"].tolist() or [facts.compared_of("base") for facts in diff.tensors]
    pieces = by_pattern(
        (facts.name, numel, "") for facts, numel in zip(diff.tensors, sizes, strict=True) if facts.pieces
    )
    for group in pieces[:_LISTED]:
        yield f"in other pieces in tuned: {safe(group['pattern'])} ({_size([group], diff, 'base')})"
    if pieces[_LISTED:]:
        yield f"in other pieces in tuned: {_size(pieces[_LISTED:], diff, 'base', more=True)}"
    for facts in diff.tensors:
        if facts.rows is not None:
            more = [f"{count:,} only in {side}" for side, count in zip(SIDES, facts.rows[1:], strict=True) if count]
            yield f"{safe(facts.name)}: {facts.rows.compared:,} rows compared, {', '.join(more)}"
        if facts.untied:
            storing, tying = SIDES if facts.compared_of("base") else SIDES[::-1]
            yield f"{safe(facts.name)} is untied: a head in {storing}, compared with what {tying} ties it to"


def _left_out(diff: Diff, side: Side) -> Iterator[str]:
    """What one side holds that was not compared, but for tensors that have a counterpart of another shape or dtype."""
    facts, names = (diff.base, diff.only_in_base) if side == "base" else (diff.tuned, diff.only_in_tuned)
    found = facts.get("left_out")
    if found is None:  # older run files tell names alone
        found = by_pattern((name, None, f"only in {side}") for name in names)
    reasons = {tensor.reason for tensor in diff.mismatched}
    by_reason: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for group in found:
        if group["why"] not in reasons:
            by_reason[group["why"]].append(group)
    for why, groups in by_reason.items():
        shown = 0 if why == EXCLUDED else _LISTED
        for group in groups[:shown]:
            yield f"{safe(why)}: {safe(group['pattern'])} ({_size([group], diff, side)})"
        if groups[shown:]:
            yield f"{safe(why)}: {_size(groups[shown:], diff, side, more=shown > 0)}"


def _mismatched(diff: Diff) -> Iterator[str]:
    groups = by_pattern((tensor.name, _values(tensor.base), tensor.reason) for tensor in diff.mismatched)
    theirs = by_pattern((tensor.name, _values(tensor.tuned), tensor.reason) for tensor in diff.mismatched)
    tuned = {(group["pattern"], group["why"]): group for group in theirs}
    for group in groups[:_LISTED]:
        sizes = (_size([group], diff, "base"), _share([tuned[group["pattern"], group["why"]]], diff, "tuned"))
        yield f"not compared: {safe(group['pattern'])} ({', '.join(filter(None, sizes))}): {safe(group['why'])}"
    if groups[_LISTED:]:
        yield f"not compared: {_size(groups[_LISTED:], diff, 'base', more=True)}"


def _values(side: Mapping[str, Any]) -> int:
    return math.prod(side.get("shape", (0,)))


def _size(groups: Sequence[Mapping[str, Any]], diff: Diff, side: Side, *, more: bool = False) -> str:
    """Spell a size as "192 tensors, 94 % of base"."""
    count = sum(group["tensors"] for group in groups)
    tensors = f"{count:,} more {'tensor' if count == 1 else 'tensors'}" if more else plural(count, "tensor")
    share = _share(groups, diff, side)
    return f"{tensors}, {share}" if share else tensors


def _share(groups: Sequence[Mapping[str, Any]], diff: Diff, side: Side) -> str:
    values, whole = [group["values"] for group in groups], diff.coverage[side].values
    return f"{percent(sum(values) / whole)} of {side}" if whole and None not in values else ""
