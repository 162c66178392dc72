"""Say what a row of figures can stand for, and which tensors belong to it. Standard library only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, Literal, TypeAlias, get_args

GroupBy: TypeAlias = Literal["tensor", "module", "layer", "layer,module", "block", "tower", "group"]

GROUPINGS: tuple[GroupBy, ...] = get_args(GroupBy)
"""What figures can be grouped by; "group" are the user's own (``--group NAME=REGEX``)."""

LABEL_KEYS: Mapping[str, tuple[str, ...]] = {
    "tensor": ("name",),
    "module": ("module_type",),
    "layer": ("tower", "layer"),
    "layer,module": ("tower", "layer", "module_type"),
    "block": ("block",),
    "tower": ("tower",),
    "group": ("group",),
}
"""Keys under which a row says which member of its grouping it is."""


def members_of(by: str, rows: Sequence[int], tensors: Sequence[Any]) -> dict[tuple[Any, ...], list[int]]:
    """Gather some rows of tensors, each a Place or TensorFacts, by the label of their group.

    Labels have the parts that :data:`LABEL_KEYS` names, and come in order of first appearance, layers in order of their
    number. A tensor outside of the layers, or in none of the user's groups, is nowhere.
    """
    keys = LABEL_KEYS[by]
    chosen = [tensors[row] for row in rows]
    found: defaultdict[Any, list[int]] = defaultdict(list)
    if by == "group":
        for row, tensor in zip(rows, chosen, strict=True):
            for name in tensor.groups:
                found[name].append(row)
    else:
        for row, label in zip(rows, map(attrgetter(*keys), chosen), strict=True):
            found[label].append(row)
    members = {(label if len(keys) > 1 else (label,)): held for label, held in found.items()}
    if "layer" not in keys:
        return members
    at = keys.index("layer")
    return dict(sorted((one for one in members.items() if one[0][at] is not None), key=lambda one: one[0][at]))
