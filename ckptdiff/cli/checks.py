"""Compare figures of the output contract with numbers, for ``--fail-if``."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptdiff.errors import OptionError
from ckptdiff.figures.members import LABEL_KEYS, GroupBy

if TYPE_CHECKING:
    from ckptdiff.figures.result import Diff, TensorFacts

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
# The key is greedy, because a tensor's name may hold operators too.
_CHECK = re.compile(r"(?P<key>.+?)\s*(?P<operator><=|>=|==|!=|<|>)\s*(?P<number>[^<>=!\s]+)\s*", re.DOTALL)
_COUNTS = ("matched", "same_bytes", "unread", "only_in_base", "only_in_tuned", "mismatched", "aliased")
_COVERAGE = tuple(f"{side}.{key}" for side in ("base", "tuned") for key in ("values", "compared", "share"))
_AGGREGATES = ("global", "median_2d")


@dataclass(frozen=True, slots=True)
class Check:
    """``KEY OP NUMBER``: it fails the run if it holds."""

    text: str
    """As the user wrote it."""
    key: str
    """Dotted key of the output contract. Members of lists go by their label: ``modules.q_proj.rel_norm``,
    ``layers.3.rel_norm`` (``layers.vision.3.rel_norm``), ``layer_modules.3.q_proj.rel_norm``,
    ``tensors.NAME.rel_norm``."""
    operator: str
    """One of < <= > >= == !=."""
    number: float

    @classmethod
    def parse(cls, text: str) -> Check:
        """Read a check and make sure that its figure exists; labels of members are not known yet."""
        match = _CHECK.fullmatch(text.strip())
        try:
            number = float(match["number"]) if match else math.nan
        except ValueError:
            number = math.nan
        if match is None or math.isnan(number):
            raise OptionError("not a check", expected="KEY OP NUMBER such as global.rel_norm>0.1", found=text)
        check = cls(text, match["key"], match["operator"], number)
        check._path()
        return check

    def require_member(self, tensors: Iterable[TensorFacts]) -> None:
        """Make sure that the member it names exists, as soon as that is known of all tensors."""
        head, label, _ = self._path()
        if label is None:
            return
        known = dict.fromkeys(name for names in _labels(_by(head), tensors) for name in names)
        if label not in known:
            from difflib import get_close_matches

            near = ", ".join(f"{head}.{name}" for name in get_close_matches(label, known))
            raise OptionError(
                f"nothing of that name in {head}",
                expected=f"a label listed in {head}",
                found=self.text,
                hint=f"nearest: {near}" if near else None,
            )

    def failed(self, diff: Diff) -> bool:
        """Whether the check holds, and so fails the run; if it cannot be answered, that is trouble, an OptionError."""
        value = self.value(diff)
        if value is None:
            raise OptionError("the figure of a check is undefined", found=self.text)
        return _OPERATORS[self.operator](value, self.number)

    def value(self, diff: Diff) -> float | None:
        """The figure of a finished diff, None if it is undefined."""
        head, label, path = self._path()
        if head == "counts":
            return diff.counts[path[0]]
        if head == "coverage":
            return _at({side: found.as_json() for side, found in diff.coverage.items()}, path)
        if label is None:
            return _at(diff.overall if head == "global" else diff.median_2d, path)
        by = _by(head)
        if by == "tensor":
            figures: list[dict[str, Any]] = [
                {"numel": int(numel), **row} for numel, row in zip(diff.columns["numel"], diff.per_tensor, strict=True)
            ]
            labels = _labels(by, diff.tensors)
        else:
            figures = diff.grouped(by)
            labels = (_row_labels(by, row) for row in figures)
        return next((_at(row, path) for row, names in zip(figures, labels, strict=True) if label in names), None)

    def _path(self) -> tuple[str, str | None, tuple[str, ...]]:
        """(first key, label of the member if it is a list, keys inside it)."""
        from ckptdiff.report.rows import LIST_KEYS, figure_paths

        head, _, rest = self.key.partition(".")
        paths = figure_paths()
        if (head == "counts" and rest in _COUNTS) or (head == "coverage" and rest in _COVERAGE):
            return head, None, tuple(rest.split("."))
        if head in _AGGREGATES and rest in paths:
            return head, None, paths[rest]
        if head in LIST_KEYS.values():
            paths["numel"] = ("numel",)
            if head != "tensors":
                paths["tensors"] = ("tensors",)
            # Labels and parameters hold dots too: the longest figure at the end wins.
            for key in sorted(paths, key=len, reverse=True):
                if rest.endswith(f".{key}") and rest != f".{key}":
                    return head, rest.removesuffix(f".{key}"), paths[key]
        raise OptionError(
            "unknown key in a check",
            expected="a key of the json report such as global.unchanged_abs.1e-05, counts.only_in_base, "
            "modules.q_proj.rel_norm or tensors.NAME.max_abs",
            found=self.text,
            hint=self._nearest(),
        )

    def _nearest(self) -> str | None:
        """The keys that an unknown one may stand for; members of lists under the label that was given."""
        from difflib import get_close_matches

        from ckptdiff.report.rows import LIST_KEYS, figure_paths

        figures = dict.fromkeys(".".join(path) for path in figure_paths().values())
        known = [f"counts.{key}" for key in _COUNTS] + [f"coverage.{key}" for key in _COVERAGE]
        known += [f"{head}.{figure}" for head in _AGGREGATES for figure in figures]
        _, *rest = self.key.split(".")
        for end in range(max(1, len(rest) - 4), len(rest)):  # no figure has more than four parts
            label = ".".join(rest[:end])
            known += [f"{head}.{label}.{figure}" for head in LIST_KEYS.values() for figure in figures]
        found = get_close_matches(self.key, known, cutoff=0.7)
        return f"nearest: {', '.join(found)}" if found else None


def _by(head: str) -> GroupBy:
    from ckptdiff.report.rows import LIST_KEYS

    return next(by for by, key in LIST_KEYS.items() if key == head)


def _at(row: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = row
    for key in path:
        # Without spectra, and for a vector, there is nothing under "spectral".
        value = None if value is None else value.get(key)
    return None if value is None else float(value)


def _labels(by: GroupBy, tensors: Iterable[TensorFacts]) -> Iterator[tuple[str, ...]]:
    """Names by which each tensor's member of a grouping may be called."""
    for facts in tensors:
        if by == "tensor":
            yield (facts.name,)
        elif by == "group":
            yield facts.groups
        else:
            row = {"module_type": facts.module_type, "tower": facts.tower, "layer": facts.layer, "block": facts.block}
            yield _row_labels(by, row)


def _row_labels(by: GroupBy, row: Mapping[str, Any]) -> tuple[str, ...]:
    keys = LABEL_KEYS[by]
    if "layer" not in keys:
        return (row[keys[0]],)
    if row["layer"] is None:
        return ()
    _, *parts = keys
    within = ".".join(str(row[key]) for key in parts)
    full = f"{row['tower']}.{within}"
    return (full, within) if row["tower"] == "language" else (full,)
