"""Counting what masks have in common, piece by piece."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ckptdiff.backends.formats import stored_format
from ckptdiff.backends.partial import BLOCK
from ckptdiff.checkpoint import Checkpoint, TensorInfo
from ckptdiff.errors import MaskError, OptionError
from ckptdiff.events import Listener, Stage, stage
from ckptdiff.overlap.figures import Overlap, PairCounts
from ckptdiff.overlap.same_base import common_tensors, require_same_base
from ckptdiff.result import TensorFacts
from ckptdiff.runfile.mask import Mask, population
from ckptdiff.runfile.reader import RunFile
from ckptdiff.runfile.schema import BIT_ORDER, mask_chunks
from ckptdiff.runfile.sides import open_side
from ckptdiff.stream.checked_blocks import KnownNorm, checked_blocks, known_norms
from ckptdiff.stream.shards import OpenShards, open_shards

__all__ = ["overlap"]

_PIECE = 1 << 20
"""Bytes of each mask in memory: small enough for the cache, and eight stored chunks."""
_MAGNITUDES = 1 << 15


def overlap(
    paths: Sequence[str | os.PathLike[str]],
    *,
    base: str | os.PathLike[str] | None = None,
    force: bool = False,
    listener: Listener | None = None,
) -> Overlap:
    """Count the coordinates that each two of several runs have both in their masks.

    Parameters
    ----------
    paths : sequence of path-like
        Two or more run files.
    base : path-like, optional
        The base checkpoint, read for the baseline that is conditional on the magnitude of the base weight. Without it,
        that baseline comes from the histograms of the run files, by powers of two, if all masks are bitwise; masks of
        other rules have none.
    force : bool
        Also lay runs of different bases on top of each other.
    listener : callable, optional
        Told of the stage "overlap".

    Returns
    -------
    Overlap

    Raises
    ------
    OptionError
        Fewer than two runs.
    MaskError
        Runs of different bases, unless forced, or of different shapes, or without a common tensor.
    RunFileError
        A run file without masks, or one that cannot be read.
    CheckpointError
        `base` is not the base of the first run: its shards have other headers, or a tensor another norm.
    """
    if len(paths) < 2:
        raise OptionError("an overlap needs two run files or more", found=len(paths))
    with ExitStack() as stack:
        runs = [stack.enter_context(RunFile(path)) for path in paths]
        diffs = [run.load() for run in runs]
        warnings = require_same_base(runs, diffs, force)
        tensors, left_out = common_tensors(runs, diffs)
        checkpoint = None if base is None else open_side(runs[0], "base", base)
        with stage(listener, "overlap", sum(_readings(facts, checkpoint) for facts in tensors)) as told:
            pairs = _count(runs, tensors, checkpoint, known_norms(diffs[0], "base"), told)
        return Overlap(
            runs=tuple(os.fspath(path) for path in paths),
            rules=tuple(diff.mask_rule for diff in diffs),
            tensors=tuple(tensors),
            pairs=pairs,
            warnings=(*warnings, *left_out),
        )


def _readings(facts: TensorFacts, base: Checkpoint | None) -> int:
    """Chunks of each mask of a tensor to be read: once for all pairs, and once more beside the base."""
    return mask_chunks(math.prod(facts.shape)) * (2 if base is not None and facts.compare != "bitwise" else 1)


def _count(
    runs: Sequence[RunFile],
    tensors: Sequence[TensorFacts],
    base: Checkpoint | None,
    known: Mapping[str, KnownNorm],
    told: Stage,
) -> tuple[PairCounts, ...]:
    pairs = list(combinations(range(len(runs)), 2))
    counts = np.zeros((len(runs), len(tensors)), np.int64)
    both = np.zeros((len(pairs), len(tensors)), np.int64)
    expected = np.full((len(pairs), len(tensors)), np.nan)
    bitwise = all(run.masks.rule.kind == "bitwise" for run in runs)
    with open_shards("pread") as shards:
        for row, facts in enumerate(tensors):
            masks = [run.masks[facts.name] for run in runs]
            counts[:, row] = [mask.count for mask in masks]
            both[:, row] = _common(masks, pairs, told)
            bins = None
            if facts.compare != "bitwise" and base is not None:
                bins = _by_magnitude(shards, base.tensors[facts.name], masks, known[facts.name], told)
            elif facts.compare != "bitwise" and bitwise:
                bins = _by_octave(runs, facts.name)
            if bins is not None:
                rest = np.array([masks[0].numel, *counts[:, row]]) - bins.sum(axis=1)
                expected[:, row] = [_expected(bins, rest, *pair) for pair in pairs]
    return tuple(PairCounts(i, j, counts[i], counts[j], both[k], expected[k]) for k, (i, j) in enumerate(pairs))


def _common(masks: Sequence[Mask], pairs: Sequence[tuple[int, int]], told: Stage) -> NDArray[np.int64]:
    """How many coordinates each pair has in both masks."""
    total = np.zeros(len(pairs), np.int64)
    wanted = [
        any(masks[i].count and masks[j].count for i, j in pairs if index in (i, j)) for index in range(len(masks))
    ]
    if not any(wanted):
        told.more(mask_chunks(masks[0].numel), masks[0].name)
        return total
    for pieces in zip(*(mask.iter_packed(_PIECE) for mask in masks), strict=True):
        for k, (i, j) in enumerate(pairs):
            if masks[i].count and masks[j].count:
                total[k] += population(pieces[i] & pieces[j])
        told.more(mask_chunks(8 * pieces[0].size), masks[0].name)
    return total


def _by_octave(runs: Sequence[RunFile], name: str) -> NDArray[np.int64]:
    """Coordinates by floor(log2 |W0|): all, then those of each bitwise mask, shape (1 + runs, 279)."""
    rows = [run.histograms[name] for run in runs]
    return np.concatenate([rows[0].base, *(row.changed for row in rows)]).astype(np.int64)


def _by_magnitude(
    shards: OpenShards, tensor: TensorInfo, masks: Sequence[Mask], known: KnownNorm, told: Stage
) -> NDArray[np.int64]:
    """Coordinates by the leading 15 bits of |W0| as stored, shape (1 + masks, 2^15)."""
    if tensor.shape != masks[0].shape:
        raise MaskError(
            "a mask does not fit the base",
            file=tensor.shard.path,
            tensor=tensor.name,
            expected=masks[0].shape,
            found=tensor.shape,
        )
    format = stored_format(tensor.dtype)
    shift = max(format.bits - 16, 0)
    bins = np.zeros((1 + len(masks), _MAGNITUDES), np.int64)
    pieces: Iterator[tuple[NDArray[np.uint8], ...]] = zip(
        *(mask.iter_packed(BLOCK // 8) for mask in masks), strict=True
    )
    for stored, packed in zip(checked_blocks(shards, tensor, known), pieces, strict=True):
        codes = stored.view(format.code_dtype)
        magnitudes = ((codes & format.code_dtype.type(format.magnitude)) >> shift).astype(np.uint16)
        bins[0] += np.bincount(magnitudes, minlength=_MAGNITUDES)
        for row, bits in enumerate(packed, 1):
            inside = np.unpackbits(bits, bitorder=BIT_ORDER, count=magnitudes.size).view(np.bool_)
            bins[row] += np.bincount(magnitudes[inside], minlength=_MAGNITUDES)
        told.more(1, tensor.name)
    return bins


def _expected(bins: NDArray[np.int64], rest: NDArray[np.int64], first: int, second: int) -> float:
    """Sum of n1 n2 / N over magnitudes; coordinates that no bin holds (NaN in the base) are one more."""
    everything = np.append(bins[0], rest[0]).astype(np.float64)
    ones, twos = (np.append(bins[1 + run], rest[1 + run]).astype(np.float64) for run in (first, second))
    return float(np.divide(ones * twos, everything, out=np.zeros_like(everything), where=everything > 0).sum())
