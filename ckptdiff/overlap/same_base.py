"""Whether runs start from the same base and have tensors in common."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ckptdiff.errors import CheckpointError, MaskError, first_few, plural
from ckptdiff.result import Diff, TensorFacts
from ckptdiff.runfile.reader import RunFile

__all__ = ["base_norms", "common_tensors", "require_norm", "require_same_base"]

_SAME = 1e-9
"""Norms of the same weights differ by less, whatever machine summed them."""
_ROUNDED = 2.0**-8
"""Casts to different dtypes move a norm by less than half a unit in bfloat16's last place."""
_SUBNORMAL = 2.0**-133
"""The smallest bfloat16 above zero: a cast moves subnormal values by up to half as much, however small they are."""


def require_same_base(runs: Sequence[RunFile], diffs: Sequence[Diff], force: bool) -> list[str]:
    """Compare the bases of runs by the norms of their tensors, since a file's name and time say little.

    Returns
    -------
    list of str
        Warnings: other bases that were forced, rules or casts that differ.

    Raises
    ------
    MaskError
        Two runs have different bases, and `force` is not set.
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
            name, ours, theirs = other
            if not force:
                raise MaskError(
                    "the runs do not start from the same base",
                    file=run.path,
                    tensor=name,
                    expected=f"norm {ours!r}, as in {runs[0].path}",
                    found=f"norm {theirs!r}",
                    hint="--force compares them all the same",
                )
            warnings.append(f"{run.path} starts from another base than {runs[0].path}")
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
                    expected=facts.shape,
                    found=other[facts.name],
                )
    if not common:
        raise MaskError(
            "the runs have no tensor in common",
            file=runs[-1].path,
            expected=f"names as in {runs[0].path}",
            found=first_few(facts.name for facts in diffs[-1].tensors),
        )
    left_out = {name for other in shapes for name in other} - {facts.name for facts in common}
    if not left_out:
        return common, []
    some = plural(len(left_out), "tensor")
    return common, [f"{some} not in all runs, left out: {first_few(sorted(left_out))}"]


def _other_base(first: Diff, other: Diff) -> tuple[str, float, float] | None:
    """The first tensor whose base norms tell two bases apart."""
    norms = base_norms(other)
    for facts, ours in zip(first.tensors, base_norms(first).values(), strict=True):
        theirs = norms.get(facts.name, math.nan)
        told = not (math.isnan(ours) or math.isnan(theirs))
        if told and not _alike(ours, theirs, facts, cast=first.compare != other.compare):
            return facts.name, ours, theirs
    return None


def _alike(norm: float, other: float, facts: TensorFacts, *, cast: bool) -> bool:
    """Whether two norms may be of the same weights, of which one may have been cast to bfloat16."""
    if not cast:
        return math.isclose(norm, other, rel_tol=_SAME)
    return math.isclose(norm, other, rel_tol=_ROUNDED, abs_tol=_SUBNORMAL * math.sqrt(math.prod(facts.shape)))


def base_norms(diff: Diff) -> dict[str, float]:
    """Norm of the base of each tensor, NaN where NaN or Inf of either side left coordinates out of it."""
    columns = diff.columns
    norms = np.where(columns["finite"] == columns["numel"], columns["base_norm"], math.nan).tolist()
    return dict(zip((facts.name for facts in diff.tensors), norms, strict=True))


def require_norm(norm: float, facts: TensorFacts, known: float, path: str) -> None:
    """Compare the norm of a base's tensor, as stored, with the one that a run knows: headers say nothing of values.

    Raises
    ------
    CheckpointError
        They differ.
    """
    if math.isfinite(known) and not _alike(norm, known, facts, cast=facts.compare != facts.dtype_base.lower()):
        raise CheckpointError(
            "not the base checkpoint that the run compared",
            file=path,
            tensor=facts.name,
            expected=f"norm {known!r}",
            found=f"norm {norm!r}",
            hint="name the base of the first run with --base",
        )
