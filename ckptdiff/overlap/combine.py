"""Write run files whose masks are the union, the intersection or the difference of others."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from ckptdiff.errors import MaskError, OptionError
from ckptdiff.events import Listener, Stage, ignore, stage
from ckptdiff.figures.result import Diff
from ckptdiff.options import MaskRule, as_tuple
from ckptdiff.overlap.count import common_tensors
from ckptdiff.run.warm_up import Uses, load
from ckptdiff.runfile.check_target import check_target
from ckptdiff.runfile.compress import compress_chunk
from ckptdiff.runfile.identity import require_same_base
from ckptdiff.runfile.mask import Mask
from ckptdiff.runfile.reader import RunFile
from ckptdiff.runfile.schema import MASK_CHUNK, mask_chunk_bytes, mask_chunks
from ckptdiff.runfile.writer import RunFileWriter

Operation: TypeAlias = Literal["union", "intersect", "minus"]
Bits: TypeAlias = NDArray[np.uint8]


def combine_masks(
    operation: Operation,
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    listener: Listener | None = None,
) -> Diff:
    """Write a run file with combined masks: those that training loops load.

    It is the first run in all but its masks: its figures and histograms are of that run's update.

    Parameters
    ----------
    operation : {"union", "intersect", "minus"}
        Coordinates in any of the masks, in all of them, or in the first and none of the others.
    paths : sequence of path-like
        Two or more run files, of the same tensors.
    out : path-like
        The run file to write.
    force : bool
        Also combine runs of different bases.
    listener : callable, optional
        Told of the stage "combining".

    Returns
    -------
    Diff
        As written.

    Raises
    ------
    OptionError
        An unknown operation, fewer than two runs, or a single string for several.
    MaskError
        Runs of different bases, unless forced, or of different tensors.
    RunFileError
        A run without masks, one that cannot be read, or an output that cannot be written.

    Examples
    --------
    >>> from ckptdiff.overlap import combine_masks
    >>> both = combine_masks("minus", ["run.h5", "run.h5"], "none.h5")
    >>> both.mask_rule, int(both.columns["changed"].sum())
    ('combined', 0)
    """
    paths = as_tuple("paths", paths)
    if operation not in get_args(Operation) or len(paths) < 2:
        raise OptionError(
            "masks cannot be combined so",
            expected=f"{', '.join(get_args(Operation))} of two run files or more",
            found=f"{operation} of {len(paths)}",
        )
    target = Path(out)
    with ExitStack() as stack:
        runs = [stack.enter_context(RunFile(path)) for path in paths]
        statuses = [Path(run.path).stat() for run in runs]
        check_target(target, [(run.path, s.st_dev, s.st_ino) for run, s in zip(runs, statuses, strict=True)])
        diffs = [run.load() for run in runs]
        warnings = require_same_base(runs, diffs, force)
        _, left_out = common_tensors(runs, diffs)
        if left_out:
            raise MaskError(
                "the runs compared different tensors",
                file=runs[-1].path,
                expected=f"the tensors of {runs[0].path}",
                found=left_out[0],
                hint="run ckptdiff diff again with --include for those that all have",
            )
        numels = diffs[0].columns["numel"].tolist()
        if numels:
            load(None, Uses((("mask", str(mask_chunk_bytes(max(numels)))),)), listener or ignore)
        with stage(listener, "combining", sum(map(mask_chunks, numels))) as told:
            return _write(target, operation, runs, replace(diffs[0], warnings=(*diffs[0].warnings, *warnings)), told)


def _write(target: Path, operation: Operation, runs: Sequence[RunFile], first: Diff, told: Stage) -> Diff:
    rule = MaskRule("combined")
    counts = np.zeros(len(first.tensors), np.uint64)
    with RunFileWriter(target, rule=rule, compare=first.compare) as writer:
        for row, facts in enumerate(first.tensors):
            counts[row] = _write_mask(writer, operation, [run.masks[facts.name] for run in runs], told)
            writer.add_histograms(runs[0].histograms[facts.name])
        result = replace(
            first,
            mask_rule=str(rule),
            columns={**first.columns, "changed": counts},
            run={**first.run, "combined": {"operation": operation, "runs": [run.path for run in runs]}},
        )
        writer.finish(result)
    return result


def _write_mask(writer: RunFileWriter, operation: Operation, masks: Sequence[Mask], told: Stage) -> int:
    name, shape, numel = masks[0].name, masks[0].shape, masks[0].numel
    if not numel:
        writer.begin_mask(name, shape)
        return 0
    count = 0
    for index, pieces in enumerate(zip(*(mask.iter_packed(MASK_CHUNK) for mask in masks), strict=True)):
        bits: Bits = reduce(_OPERATORS[operation], pieces)
        count += int(np.bitwise_count(bits).sum(dtype=np.int64))
        writer.add_mask_chunks(name, shape, index, [compress_chunk(bits, mask_chunk_bytes(numel))])
        told.more(1, name)
    return count


_OPERATORS: dict[str, Callable[[Bits, Bits], Bits]] = {
    "union": np.bitwise_or,
    "intersect": np.bitwise_and,
    "minus": lambda a, b: a & ~b,
}
