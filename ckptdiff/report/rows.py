"""The members of a grouping as rows: what every format prints, sorted and cut alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ckptdiff.errors import OptionError
from ckptdiff.figures.catalogue import FIGURES, flat_keys, parameter_key
from ckptdiff.figures.members import LABEL_KEYS, GroupBy
from ckptdiff.figures.result import Diff, TensorFacts
from ckptdiff.figures.spectral import SPECTRAL_FIGURES, SPECTRAL_KEYS, spectral_keys
from ckptdiff.report.text import safe

Row = dict[str, Any]

LIST_KEYS: Mapping[GroupBy, str] = {
    "module": "modules",
    "layer": "layers",
    "layer,module": "layer_modules",
    "block": "blocks",
    "tower": "towers",
    "group": "groups",
    "tensor": "tensors",
}
"""Key of the output contract under which each grouping is listed."""

LABELS: Mapping[str, tuple[str, ...]] = {
    **LABEL_KEYS,
    "tensor": (
        *("name", "tuned_name", "shape", "dtype_base", "dtype_tuned", "compare"),
        *("tower", "layer", "module_type", "block", "groups"),
    ),
}
"""Keys of a row that say which member it is, before its counts and figures."""

SPECTRAL = "spectral"
"""Key of a row under which its spectral figures stand, if spectra were measured."""
SPECTRAL_FACTS = ("method", "matrices", "rank", "reason")
"""What stands there beside figures: groups have the first two."""

_COUNTS = ("tensors", "numel")
_DIRECTIONS = ("asc", "desc")


@dataclass(frozen=True, slots=True)
class View:
    """Which rows of a diff to print, and in which order; one that cannot be is refused with an OptionError."""

    by: GroupBy | None = None
    """None stands for what the format prints by itself."""
    sort: str | None = None
    """A label, a count or a figure ("rel_norm", "unchanged_abs.1e-05"), optionally with ``:asc`` or ``:desc``. Figures
    and counts go from large to small and labels from small to large; undefined values come last."""
    top: int | None = None
    """How many rows to keep."""
    run_file: str | None = None
    """Where the masks are, for the table to say so."""

    def __post_init__(self) -> None:
        if self.top is not None and self.top < 1:
            raise OptionError("number of rows out of range", expected="1 or more", found=self.top)
        if self.sort is not None:
            self.sort_path()

    @property
    def rows_by(self) -> GroupBy:
        """The grouping of the rows: single tensors unless another was asked for."""
        return self.by or "tensor"

    def sort_path(self) -> tuple[tuple[str, ...], bool]:
        """Where the sort key stands in a row, and whether large values come first."""
        if self.sort is None:
            raise ValueError("the view keeps its own order")
        key, colon, direction = self.sort.rpartition(":")
        if direction not in _DIRECTIONS or not colon:
            key, direction = self.sort, ""
        labels = [label for label in LABELS[self.rows_by] if label not in ("shape", "groups")]
        paths = figure_paths()
        path = (key,) if key in labels or key in _COUNTS else paths.get(key)
        if path is None or (key == "tensors" and self.rows_by == "tensor"):
            raise OptionError(
                "unknown sort key",
                expected=f"{', '.join((*labels, *_COUNTS))} or a figure such as rel_norm or unchanged_abs.1e-05",
                found=self.sort,
            )
        return path, (direction or ("asc" if key in labels else "desc")) == "desc"


def figure_paths() -> dict[str, tuple[str, ...]]:
    """Every figure's place in a row, by its dotted key and by its flat key."""
    paths: dict[str, tuple[str, ...]] = {}
    for figure in FIGURES:
        for parameter, flat in flat_keys(figure):
            path = _place(figure.key, parameter)
            paths[flat] = paths[".".join(path)] = path
    for spectral in SPECTRAL_FIGURES:
        for parameter, flat in spectral_keys(spectral):
            path = (SPECTRAL, *_place(spectral.key, parameter))
            paths[f"{SPECTRAL}_{flat}"] = paths[".".join(path)] = path
    return paths


def _place(key: str, parameter: float | None) -> tuple[str, ...]:
    return (key,) if parameter is None else (key, parameter_key(parameter))


def flat_columns(by: GroupBy, *, spectra: bool = False) -> tuple[str, ...]:
    """Keys of flattened rows, in the order of csv and parquet columns."""
    counts = ("numel",) if by == "tensor" else _COUNTS
    figures = (flat for figure in FIGURES for _, flat in flat_keys(figure))
    columns = (*LABELS[by], *counts, *figures)
    if not spectra:
        return columns
    facts = SPECTRAL_FACTS if by == "tensor" else SPECTRAL_FACTS[:2]
    return (*columns, *(f"{SPECTRAL}_{key}" for key in (*facts, *SPECTRAL_KEYS)))


def tensor_row(facts: TensorFacts, numel: int, figures: Mapping[str, Any]) -> Row:
    """One tensor as the output contract writes it."""
    row: Row = {"name": facts.name}
    if facts.tuned_name is not None:
        row["tuned_name"] = facts.tuned_name
    if facts.unread:
        row["unread"] = True
    return {
        **row,
        "shape": list(facts.shape),
        "dtype_base": facts.dtype_base,
        "dtype_tuned": facts.dtype_tuned,
        "compare": facts.compare,
        "numel": numel,
        "tower": facts.tower,
        "layer": facts.layer,
        "module_type": facts.module_type,
        "block": facts.block,
        **({"groups": list(facts.groups)} if facts.groups else {}),
        **({"pieces": [asdict(piece) for piece in facts.pieces]} if facts.pieces else {}),
        **({"rows": facts.rows._asdict()} if facts.rows else {}),
        **({"untied": True} if facts.untied else {}),
        **(facts.kept._asdict() if facts.kept else {}),
        **figures,
    }


def rows(diff: Diff, view: View) -> list[Row]:
    """The rows of a view, sorted and cut."""
    if view.rows_by == "tensor":
        chosen, numel = _chosen_tensors(diff, view), diff.columns["numel"].tolist()
        figures = diff.of_tensors(chosen)
        return [tensor_row(diff.tensors[at], numel[at], row) for at, row in zip(chosen, figures, strict=True)]
    members = diff.grouped(view.rows_by)
    if view.sort is not None:
        path, descending = view.sort_path()
        members = [members[at] for at in _sorted([_value(row, path) for row in members], descending)]
    return members[: view.top]


def _chosen_tensors(diff: Diff, view: View) -> Sequence[int]:
    """Which tensors a view shows; only the key they are sorted by is computed for all."""
    if view.sort is None:
        return range(len(diff.tensors))[: view.top]
    path, descending = view.sort_path()
    if path[0] == SPECTRAL:
        spectral = [math.nan] * len(diff.tensors)
        if diff.spectra is not None:
            spectral = diff.spectra.columns["_".join(path[1:])].tolist()
        return _sorted([None if math.isnan(value) else value for value in spectral], descending)[: view.top]
    for figure in FIGURES:
        for parameter, _ in flat_keys(figure):
            if _place(figure.key, parameter) == path:
                found = diff.values(figure, parameter)
                # Undefined ones are last in either order, and equal ones stay as they come.
                order: list[int] = np.argsort(-found if descending else found, kind="stable").tolist()
                return order[: view.top]
    numel = diff.columns["numel"].tolist()
    labels = [_value(tensor_row(*parts, {}), path) for parts in zip(diff.tensors, numel, strict=True)]
    return _sorted(labels, descending)[: view.top]


def _sorted(values: Sequence[Any], descending: bool) -> list[int]:
    """Places of values in their order, undefined ones last."""
    defined = [at for at, value in enumerate(values) if value is not None]
    undefined = [at for at, value in enumerate(values) if value is None]
    return sorted(defined, key=lambda at: values[at], reverse=descending) + undefined


def _value(row: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = row
    for key in path:
        # A diff without spectra, or a vector, has no spectral figures at all.
        value = None if value is None else value.get(key)
    return value


def flatten(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (flat key, value): ``{"unchanged_abs": {"1e-05": x}}`` becomes ``("unchanged_abs_1e-05", x)``."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            for inner, cell in flatten(value):
                yield f"{key}_{inner}", cell
        else:
            yield key, value


def labels(members: Sequence[Mapping[str, Any]], by: GroupBy) -> list[str]:
    """Names of the members of a grouping on the screen."""
    keys = LABEL_KEYS[by]
    if "layer" in keys and len({row["tower"] for row in members}) == 1:
        keys = keys[1:]
    return [safe(" ".join(str(row[key]) for key in keys)) or '""' for row in members]
