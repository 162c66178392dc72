"""Multiply the updates of several runs with each other, for the cosines between them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import Checkpoint
from ckptdiff.errors import CheckpointError, OptionError, PairingError, first_few, plural
from ckptdiff.events import Listener
from ckptdiff.figures.result import Diff, TensorFacts
from ckptdiff.runfile.identity import open_side
from ckptdiff.runfile.reader import RunFile
from ckptdiff.track.follow import MOST_STEPS, follow_all, sample_warning
from ckptdiff.track.plan import plan_track

_SAME = 2e-5
"""Norms of an update, one of them summed in float32 over 256 coordinates, differ by less of their size."""


def update_products(
    runs: Sequence[RunFile],
    diffs: Sequence[Diff],
    tensors: Sequence[TensorFacts],
    base: str | os.PathLike[str] | None,
    tuned: Sequence[str | os.PathLike[str]],
    threads: int,
    stream: bool,
    tell: Listener,
) -> tuple[NDArray[np.float64], list[str]]:
    """Sums over each tensor of the products of each two updates, and of the squares of these products.

    Both in the order (0, 0), (1, 0), (1, 1), (2, 0), ... of runs; shape (tensors, 2, pairs), NaN for a tensor that is
    not one whole stored tensor everywhere. Then warnings about those, and about a sample.

    Raises CheckpointError for a checkpoint that is not what its run compared, by its headers or by the norm of its
    update, and OptionError or PairingError if there is nothing to multiply.
    """
    if tuned and len(tuned) != len(runs):
        raise OptionError(
            "not a tuned checkpoint for each run", expected=f"{len(runs)}, in the order of the runs", found=len(tuned)
        )
    first = open_side(runs[0], "base", base, stream)
    sides = [
        open_side(run, "tuned", path, stream) for run, path in zip(runs, tuned or repeat(None, len(runs)), strict=True)
    ]
    mode = diffs[0].options["compare"]
    plan = plan_track(first.path, [side.path for side in sides], compare=mode, tell=tell, stream=stream)
    places = {facts.name: at for at, facts in enumerate(tensors)}
    followed = [tensor for tensor in plan.tensors if tensor.sides[0].name in places]
    if not followed:
        raise PairingError(
            "no tensor that all runs have in common is one whole stored tensor in all checkpoints",
            file=first.path,
            expected="floating tensors of the same names and shapes in the base and every tuned checkpoint",
            found=first_few(places),
        )
    rows = [places[tensor.sides[0].name] for tensor in followed]
    found = follow_all(followed, threads, tell, kinds=2, name="values")
    products = np.full((len(tensors), *found.products.shape[1:]), np.nan)
    products[rows] = found.products
    formats = {tensor.sides[0].name: tensor.compare.name for tensor in followed}
    for at, (diff, side) in enumerate(zip(diffs, sides, strict=True)):
        norms = np.sqrt(found.squares[:, 1 + at]).tolist()
        _require_norms(diff, side, formats, dict(zip(formats, norms, strict=True)))
    warnings = [sample_warning(len(runs), "runs")] if len(runs) > MOST_STEPS else []
    lacking = [facts.name for facts in tensors if facts.compare != "bitwise" and facts.name not in formats]
    if lacking:
        some = plural(len(lacking), "tensor")
        warnings.append(f"no cosine of {some}, as only whole stored tensors are read: {first_few(lacking)}")
    return products, warnings


def _require_norms(diff: Diff, side: Checkpoint, formats: Mapping[str, str], norms: Mapping[str, float]) -> None:
    """Raise CheckpointError if an update that was read has not the norm that its run measured, in the same format."""
    for facts, known in zip(diff.tensors, diff.columns["delta_norm"].tolist(), strict=True):
        comparable = formats.get(facts.name) == facts.compare and math.isfinite(known)
        if comparable and not math.isclose(norms[facts.name], known, rel_tol=_SAME):
            raise CheckpointError(
                "not the checkpoints that the run compared: their headers are the same, but other values",
                file=side.path,
                tensor=facts.name,
                expected=f"an update of norm {known!r}",
                found=f"norm {norms[facts.name]!r}",
                hint="name the checkpoints of the runs with --base and --tuned, or run ckptdiff diff again",
            )
