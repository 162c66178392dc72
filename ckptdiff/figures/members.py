"""Say what a row of figures can stand for, and which tensors belong to it. Standard library only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
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


def members_of(by: str, tensors: Iterable[tuple[int, Any]]) -> dict[tuple[Any, ...], list[int]]:
    """Gather the rows of tensors, each a Place or TensorFacts, by the label of their group.

    Labels have the parts that :data:`LABEL_KEYS` names, and come in order of first appearance, layers in order of their
    number. A tensor outside of the layers, or in none of the user's groups, is nowhere.
    """
    keys = LABEL_KEYS[by]
    layered = "layer" in keys
    label_of = attrgetter(*keys)
    found: defaultdict[Any, list[int]] = defaultdict(list)
    for row, tensor in tensors:
        if by == "group":
            for name in tensor.groups:
                found[name].append(row)
        elif not layered or tensor.layer is not None:
            found[label_of(tensor)].append(row)
    members = {(label if len(keys) > 1 else (label,)): rows for label, rows in found.items()}
    return dict(sorted(members.items(), key=lambda member: member[0][keys.index("layer")])) if layered else members
