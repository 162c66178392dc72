"""Refuse runs that start from different bases, and find the tensors that they have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptdiff.errors import MaskError, first_few, plural
from ckptdiff.figures.result import Diff, TensorFacts
from ckptdiff.formats import FORMATS, is_wide, stored_format
from ckptdiff.runfile.reader import RunFile

__all__ = ["common_tensors", "require_same_base"]

_SAME = 1e-9
"""Norms of the same weights differ by less, whatever machine summed them."""


def require_same_base(runs: Sequence[RunFile], diffs: Sequence[Diff], force: bool) -> list[str]:
    """Compare the bases of runs by the norms of their tensors, since a file's name and time say little.

    Returns
    -------
    list of str
        Warnings: other bases that were forced, rules or casts that differ.

    Raises
    ------
    MaskError
        Two runs have different bases, or compare different dtypes of it that nothing else shows to be the same, and
        `force` is not set.
    RunFileError
        A run without masks.
    """
    warnings: list[str] = []
    for run in runs:
        run.require_masks()
    first = diffs[0]
    for run, diff in zip(runs[1:], diffs[1:], strict=True):
        other = _other_base(first, diff)
        if other is not None:
            if not force:
                other.file, other.hint = run.path, other.hint or "--force compares them all the same"
                raise other
            warnings.append(f"{run.path} may start from another base than {runs[0].path}")
        if (diff.compare, diff.mask_rule) != (first.compare, first.mask_rule):
            warnings.append(
                f"masks by different rules: {run.path} by {diff.mask_rule} (compared as {diff.compare}),"
                f" {runs[0].path} by {first.mask_rule} ({first.compare})"
            )
    return warnings


def common_tensors(runs: Sequence[RunFile], diffs: Sequence[Diff]) -> tuple[list[TensorFacts], list[str]]:
    """Tensors that all runs have masked, in the order of the first, and warnings about those that some have not.

    Raises
    ------
    MaskError
        A tensor of different shapes, or none in common.
    """
    shapes = [{facts.name: facts.shape for facts in diff.tensors} for diff in diffs]
    common = [facts for facts in diffs[0].tensors if all(facts.name in other for other in shapes)]
    for facts in common:
        for run, other in zip(runs, shapes, strict=True):
            if other[facts.name] != facts.shape:
                raise MaskError(
                    "a tensor has different shapes in two runs",
                    file=run.path,
                    tensor=facts.name,
                    expected=f"{facts.shape}, as in {runs[0].path}",
                    found=other[facts.name],
                    hint="compare runs of one base; ckptdiff diff --exclude leaves the tensor out",
                )
    if not common:
        raise MaskError(
            "the runs have no tensor in common",
            file=runs[-1].path,
            expected=f"names as in {runs[0].path}",
            found=first_few(facts.name for facts in diffs[-1].tensors),
            hint="compare runs of one base, whose tensors have the same names",
        )
    left_out = {name for other in shapes for name in other} - {facts.name for facts in common}
    if not left_out:
        return common, []
    some = plural(len(left_out), "tensor")
    return common, [f"{some} not in all runs, left out: {first_few(sorted(left_out))}"]


def _other_base(first: Diff, other: Diff) -> MaskError | None:
    """What says that two runs have different bases, or that nothing says they have the same."""
    norms = _base_norms(other)
    same_files = _files_of(first) == _files_of(other)
    for name, ours in _base_norms(first).items():
        theirs = norms.get(name, ours)
        comparable = ours.compare == theirs.compare or (ours.as_stored and theirs.as_stored)
        known = not math.isnan(ours.norm + theirs.norm)
        if comparable and known and not math.isclose(ours.norm, theirs.norm, rel_tol=_SAME):
            return MaskError(
                "the runs do not start from the same base",
                tensor=name,
                expected=f"norm {ours.norm!r}, as in the first run",
                found=f"norm {theirs.norm!r}",
            )
        # A cast moves a norm as much as some steps of training do.
        if not comparable and not same_files:
            return MaskError(
                "the runs compare the base in different dtypes, so that nothing tells whether it is the same",
                tensor=name,
                expected=f"{ours.compare}, as in the first run, or the same files with the same times",
                found=theirs.compare,
                hint="run ckptdiff diff again with one --compare; --force compares them all the same",
            )
    return None


@dataclass(frozen=True, slots=True)
class _BaseNorm:
    """Norm of a tensor of the base after the cast; NaN where NaN or Inf of either side left coordinates out of it."""

    norm: float
    compare: str
    as_stored: bool
    """Whether the cast changed no value."""


def _files_of(diff: Diff) -> list[tuple[Any, ...]]:
    """Header, size and time of each shard of the base."""
    return sorted(tuple(shard[key] for key in ("header_sha256", "size", "mtime_ns")) for shard in diff.base["shards"])


def _base_norms(diff: Diff) -> dict[str, _BaseNorm]:
    columns = diff.columns
    norms = np.where(columns["finite"] == columns["numel"], columns["base_norm"], math.nan).tolist()
    return {
        facts.name: _BaseNorm(norm, facts.compare, _is_kept(facts))
        for facts, norm in zip(diff.tensors, norms, strict=True)
    }


def _is_kept(facts: TensorFacts) -> bool:
    return facts.compare == "bitwise" or not is_wide(stored_format(facts.dtype_base), FORMATS[facts.compare])
