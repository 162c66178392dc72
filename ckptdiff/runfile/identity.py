"""Tell whether a checkpoint is the one that a run saw, and whether runs saw the same base.

Headers are the same at each step of a training, and a file's name says little: so norms tell as well.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import Checkpoint, open_checkpoint
from ckptdiff.checkpoint.blocks import blocks_of, values_of
from ckptdiff.checkpoint.boxes import stored_parts
from ckptdiff.checkpoint.dtypes import DTYPES
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.checkpoint.weights import Weight
from ckptdiff.errors import CheckpointError, MaskError
from ckptdiff.figures.result import Diff, TensorFacts
from ckptdiff.formats import FORMATS, Format, is_wide, recode_table, round_to_bf16, stored_format
from ckptdiff.runfile.reader import RunFile

_HEADERS = "header_sha256", "size"
_FILES = *_HEADERS, "mtime_ns"
"""What tells that a shard has not been modified."""
_SAME = 1e-9
"""Norms of the same weights, and sums of the same squares, differ by less of their size, whatever machine made them."""
_ROUNDED = 2.0**-22
"""A difference in float32 is off by 2^-24 of itself; twice that where it is multiplied, and twice again for room."""


def open_side(run: RunFile, side: str, path: str | os.PathLike[str] | None = None, stream: bool = False) -> Checkpoint:
    """Open the base or the tuned checkpoint of a run, by default where the run found it; `stream` downloads nothing.

    Raises CheckpointError if it cannot be read, or is not what the run compared: another number of shards, or one of
    another size or header. At its old place a shard must not have been modified either.
    """
    known: dict[str, Any] = run.provenance[side]
    try:
        checkpoint = open_checkpoint(path or known["path"], stream)
    except CheckpointError as error:
        error.hint = error.hint or f"name the place of the {side} checkpoint with --{side}"
        raise
    # A commit of a model says more than when a file of it came here.
    same_commit = checkpoint.origin.get("commit", "") == known.get("commit")
    fields = _HEADERS if path or same_commit else _FILES
    expected = sorted(map(itemgetter(*fields), known["shards"]))
    found = sorted(map(attrgetter(*fields), checkpoint.shards))
    if expected != found:
        raise CheckpointError(
            f"not the {side} checkpoint that the run compared",
            file=checkpoint.path,
            expected=f"{len(expected)} shards of {known['path']}, as they were then",
            found=f"{len(found)} shards, of which {len(set(expected) & set(found))} are as they were",
            hint="run ckptdiff diff again",
        )
    return checkpoint


@dataclass(frozen=True, slots=True)
class KnownNorm:
    """Norm of a tensor of one side, as a run has measured it."""

    side: Literal["base", "tuned"]
    compare: str
    """Format that the values were cast to before their norm was taken."""
    square: float
    """The square of that norm; NaN if the run does not know it, because of NaN or Inf on either side."""
    tolerance: float
    """By how much the square of equal values may differ from it."""


def known_norms(diff: Diff, side: Literal["base", "tuned"]) -> dict[str, KnownNorm]:
    """Norms of the tensors of a side, by their names in the base."""
    columns = diff.columns
    with np.errstate(over="ignore", invalid="ignore"):
        base, delta = columns["base_norm"], columns["delta_norm"]
        if side == "base":
            squares = np.square(base)
            tolerances = _SAME * squares
        else:
            # W1 = W0 + d
            squares = np.square(base) + 2 * columns["base_dot_delta"] + np.square(delta)
            tolerances = _SAME * (np.square(base) + np.square(delta)) + _ROUNDED * delta * (base + delta)
    known = zip(diff.tensors, _if_finite(diff, squares), tolerances.tolist(), strict=True)
    return {facts.name: KnownNorm(side, facts.compare, square, tolerance) for facts, square, tolerance in known}


def checked_blocks(shards: OpenShards, tensor: Weight, known: KnownNorm | None) -> Iterator[NDArray[np.uint8]]:
    """Stored bytes as `blocks_of` yields them, and a look at the norm, unless `known` is None.

    Raises CheckpointError after the last block, if the tensor has another norm than the run has measured.
    """
    if known is None or not math.isfinite(known.square + known.tolerance):
        yield from blocks_of(shards, tensor)
        return
    compare = FORMATS[known.compare]
    square = 0.0
    for stored in blocks_of(shards, tensor):
        with np.errstate(over="ignore", invalid="ignore"):
            square += float(np.square(_cast(tensor.dtype, stored, compare), dtype=np.float64).sum())
        yield stored
    if not abs(square - known.square) <= known.tolerance:
        raise CheckpointError(
            f"not the {known.side} checkpoint that the run compared: its headers are the same, but other values",
            file=stored_parts(tensor)[0].shard.path,
            tensor=tensor.name,
            expected=f"norm {math.sqrt(max(known.square, 0.0))!r}",
            found=f"norm {math.sqrt(square)!r}",
            hint=f"name the {known.side} checkpoint of that run with --{known.side}, or run ckptdiff diff again",
        )


def _cast(dtype: str, stored: NDArray[np.uint8], compare: Format) -> NDArray[np.floating]:
    """Values after the cast to the compare format."""
    format = stored_format(dtype)
    if format == compare:
        return values_of(dtype, stored)
    if format.bits <= 16:
        codes: NDArray[np.unsignedinteger] = recode_table(format, compare)[stored.view(format.code_dtype)]
    elif compare.name == "bf16":
        codes = round_to_bf16(values_of(dtype, stored).astype(np.float32).view(np.uint32))
    else:
        codes = values_of(dtype, stored).astype(f"f{compare.bits // 8}").view(compare.code_dtype)
    if compare.bits <= 16:
        narrow: NDArray[np.floating] = compare.values()[codes]
        return narrow
    wide: NDArray[np.floating] = codes.view(f"f{compare.bits // 8}")
    return wide


def require_same_base(runs: Sequence[RunFile], diffs: Sequence[Diff], force: bool) -> list[str]:
    """Compare the bases of runs by the norms of their tensors, since a file's name and time say little.

    The warnings it returns tell of other bases that were forced, and of rules or casts that differ. Raises MaskError if
    two runs have different bases, or compare different dtypes of it that nothing else shows to be the same, unless that
    is forced, and RunFileError for a run without masks.
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


def _other_base(first: Diff, other: Diff) -> MaskError | None:
    """The error that says why two runs have different bases, or why nothing tells that they have the same."""
    of_first, of_other = (sorted(map(itemgetter(*_FILES), diff.base["shards"])) for diff in (first, other))
    norms = [_if_finite(diff, diff.columns["base_norm"]) for diff in (first, other)]
    known = {facts.name: (facts, norm) for facts, norm in zip(other.tensors, norms[1], strict=True)}
    for ours, our_norm in zip(first.tensors, norms[0], strict=True):
        theirs, norm = known.get(ours.name, (ours, our_norm))
        if _part(ours) != _part(theirs):
            continue  # norms of other weights
        comparable = ours.compare == theirs.compare or (_is_kept(ours) and _is_kept(theirs))
        if comparable and not math.isnan(our_norm + norm) and not math.isclose(our_norm, norm, rel_tol=_SAME):
            return MaskError(
                "the runs do not start from the same base",
                tensor=ours.name,
                expected=f"norm {our_norm!r}, as in the first run",
                found=f"norm {norm!r}",
            )
        # A cast moves a norm as much as some steps of training do.
        if not comparable and of_first != of_other:
            return MaskError(
                "the runs compare the base in different dtypes, so that nothing tells whether it is the same",
                tensor=ours.name,
                expected=f"{ours.compare}, as in the first run, or the same files with the same times",
                found=theirs.compare,
                hint="run ckptdiff diff again with one --compare; --force compares them all the same",
            )
    return None


def _part(facts: TensorFacts) -> object:
    """What was compared of a tensor of the base, if not all of it."""
    return facts.compared and (facts.compared, facts.rows, frozenset(piece.base_index for piece in facts.pieces))


def _is_kept(facts: TensorFacts) -> bool:
    """Whether the cast of the base changed no value."""
    values = facts.dtype_base if facts.dtype_base in DTYPES else "F32"  # what codes with scales are decoded to
    return facts.compare == "bitwise" or not is_wide(stored_format(values), FORMATS[facts.compare])


def _if_finite(diff: Diff, values: NDArray[np.float64]) -> list[float]:
    """Of each tensor, but NaN where NaN or Inf of either side left coordinates out."""
    found: list[float] = np.where(diff.columns["finite"] == diff.columns["numel"], values, math.nan).tolist()
    return found
