"""The json report: the output contract of a diff, one object of plain JSON values on one line."""

from __future__ import annotations

from typing import Any, TextIO

from ckptdiff.figures.result import Diff
from ckptdiff.report.rows import LIST_KEYS, View, rows
from ckptdiff.report.text import dumps

SCHEMA = "ckptdiff.diff/1"


def write(diff: Diff, stream: TextIO, view: View) -> None:
    """Write one JSON object and a newline."""
    stream.write(dumps(document(diff, view)) + "\n")


def facts(diff: Diff) -> dict[str, Any]:
    """Facts known before any data is read: both sides, the options that matter, and the tensors left out."""
    return {
        "schema": SCHEMA,
        "ckptdiff_version": diff.ckptdiff_version,
        "base": dict(diff.base),
        "tuned": dict(diff.tuned),
        "compare": diff.compare,
        "mask_rule": diff.mask_rule,
        "counts": diff.counts,
        "coverage": {side: found.as_json() for side, found in diff.coverage.items()},
        "only_in_base": list(diff.only_in_base),
        "only_in_tuned": list(diff.only_in_tuned),
        "aliased": [{"name": name, "of": of} for name, of in diff.aliased],
        "mismatched": [
            {"name": tensor.name, "base": dict(tensor.base), "tuned": dict(tensor.tuned), "reason": tensor.reason}
            for tensor in diff.mismatched
        ],
        "suggested_map": list(diff.suggested_map),
    }


def aggregates(diff: Diff, view: View | None = None) -> dict[str, Any]:
    """The figures of groups: global, medians, module types, layers, blocks, towers and the user's groups.

    Module types within layers are many: they come where the view is of them.
    """
    view = view or View()
    groupings: dict[str, Any] = {}
    for by, key in LIST_KEYS.items():
        shown = by != "layer,module" or view.by == by
        if by == "tensor" or not shown or (by == "group" and not diff.options.get("groups")):
            continue
        groupings[key] = rows(diff, view if view.by == by else View(by))
    return {"global": diff.overall, "median_2d": diff.median_2d, **groupings, "warnings": list(diff.warnings)}


def document(diff: Diff, view: View | None = None, *, tensors: bool = True) -> dict[str, Any]:
    """A diff as one JSON object (schema "ckptdiff.diff/1"): fractions are 0..1, and undefined figures None.

    A view sorts and cuts the one list that its `by` names ("tensors" by default); the rest stays whole. That list of
    all tensors can be left out.
    """
    view = view or View()
    listed = {"tensors": rows(diff, view if view.rows_by == "tensor" else View("tensor"))} if tensors else {}
    head = facts(diff)
    tail = {key: head.pop(key) for key in ("only_in_base", "only_in_tuned", "aliased", "mismatched", "suggested_map")}
    return {**head, **aggregates(diff, view), **listed, **tail}
