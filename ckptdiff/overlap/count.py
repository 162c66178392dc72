"""Count the coordinates that masks have in common, piece by piece."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import combinations
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint.boxes import stored_parts
from ckptdiff.checkpoint.open_shards import OpenShards, open_shards
from ckptdiff.checkpoint.pairs import first_rows
from ckptdiff.checkpoint.region import among
from ckptdiff.checkpoint.side_weights import weights_of
from ckptdiff.checkpoint.weights import CommonPart, Region, Source, Weight
from ckptdiff.errors import MaskError, OptionError, first_few, plural
from ckptdiff.events import Listener, Stage, ignore, stage
from ckptdiff.figures.result import Diff, TensorFacts
from ckptdiff.formats import stored_format
from ckptdiff.in_order import Task, in_order
from ckptdiff.measure.partial import BLOCK
from ckptdiff.options import as_tuple, check_threads, default_threads
from ckptdiff.overlap.figures import Overlap, PairCounts
from ckptdiff.runfile.identity import KnownNorm, checked_blocks, known_norms, open_side, require_same_base
from ckptdiff.runfile.mask import Mask, population
from ckptdiff.runfile.reader import RunFile
from ckptdiff.runfile.schema import BIT_ORDER, mask_chunks

_Packed: TypeAlias = tuple[NDArray[np.uint8], ...]
_PIECE = 1 << 20
"""Bytes of each mask in memory: small enough for the cache, and eight stored chunks."""
_MAGNITUDES = 1 << 15


def overlap(
    paths: Sequence[str | os.PathLike[str]],
    *,
    base: str | os.PathLike[str] | None = None,
    values: bool = False,
    tuned: Sequence[str | os.PathLike[str]] = (),
    force: bool = False,
    threads: int = 0,
    stream: bool = False,
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
    values : bool
        Also read all checkpoints of the runs, for the cosine between each two updates.
    tuned : sequence of path-like
        Where the tuned checkpoints of the runs are now, in the order of the runs, by default where they were. They are
        only read for values.
    force : bool
        Also lay runs of different bases on top of each other.
    threads : int
        0 stands for one per available core.
    stream : bool
        Whether models of the hub are read where they are; else they are downloaded first.
    listener : callable, optional
        Told of the stage "overlap", and of "values" if they are read.

    Returns
    -------
    Overlap

    Raises
    ------
    OptionError
        Fewer than two runs, a single string for several, or a number of threads out of range.
    MaskError
        Runs of different bases, unless forced, or of different shapes, or without a common tensor.
    RunFileError
        A run file without masks, or one that cannot be read.
    CheckpointError
        `base` is not the base of the first run: its shards have other headers, or a tensor another norm. Or the values
        of a checkpoint are not those that its run compared.
    PairingError
        Values are wanted, and no common tensor is one whole stored tensor in all checkpoints.

    Examples
    --------
    >>> from ckptdiff.overlap import overlap
    >>> found = overlap(["run.h5", "run.h5"])
    >>> (pair,) = found.pairs
    >>> found.overall(pair)["jaccard"]
    1.0
    """
    paths = as_tuple("paths", paths)
    if len(paths) < 2:
        raise OptionError("an overlap needs two run files or more", found=len(paths))
    check_threads(threads)
    with ExitStack() as stack:
        runs = [stack.enter_context(RunFile(path)) for path in paths]
        diffs = [run.load() for run in runs]
        warnings = require_same_base(runs, diffs, force)
        tensors, left_out = common_tensors(runs, diffs)
        weights = None
        if base is not None:
            encoded = diffs[0].options.get("values", "codes")
            weights = weights_of(open_side(runs[0], "base", base, stream), encoded).named
            lacking = [facts.name for facts in tensors if facts.name not in weights]
            if lacking:
                left_out.append(f"no chance by size where the base stores an embedding alone: {first_few(lacking)}")
        products = None
        if values:
            from ckptdiff.overlap.cosines import update_products

            asked = base, as_tuple("tuned", tuned), threads or default_threads(), stream, listener or ignore
            products, unread = update_products(runs, diffs, tensors, *asked)
            left_out += unread
        shards = stack.enter_context(open_shards("pread"))
        counting = _Counting(runs, weights, known_norms(diffs[0], "base"), shards)
        with stage(listener, "overlap", sum(_readings(facts, weights) for facts in tensors)) as told:
            pairs = counting.count(tensors, threads or default_threads(), told)
        return Overlap(
            runs=tuple(os.fspath(path) for path in paths),
            rules=tuple(diff.mask_rule for diff in diffs),
            tensors=tuple(tensors),
            pairs=pairs,
            warnings=(*warnings, *left_out),
            products=products,
        )


def common_tensors(runs: Sequence[RunFile], diffs: Sequence[Diff]) -> tuple[list[TensorFacts], list[str]]:
    """Tensors that all runs have masked, in the order of the first, and warnings about those that some have not.

    Raises MaskError for a tensor of different shapes, or if none is common.
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


def _readings(facts: TensorFacts, base: Mapping[str, Source] | None) -> int:
    """Chunks of each mask of a tensor to be read: once for all pairs, and once more beside the base."""
    beside = base is not None and facts.compare != "bitwise" and facts.name in base
    chunks = mask_chunks(math.prod(facts.shape))
    return chunks + (mask_chunks(facts.compared_of("base")) if beside else 0)


class _Counting:
    """Counts every tensor, on threads; by magnitude too, if there is a base, of which the first run knows norms."""

    def __init__(
        self,
        runs: Sequence[RunFile],
        base: Mapping[str, Source] | None,
        known: Mapping[str, KnownNorm],
        shards: OpenShards,
    ) -> None:
        self._runs, self._base, self._known, self._shards = runs, base, known, shards
        self._pairs = list(combinations(range(len(runs)), 2))
        self._bitwise = all(run.masks.rule.kind == "bitwise" for run in runs)
        self._read: deque[tuple[int, str]] = deque()
        self._stop = threading.Event()

    def count(self, tensors: Sequence[TensorFacts], threads: int, told: Stage) -> tuple[PairCounts, ...]:
        """Count all tensors, as many at a time as there are threads."""
        counts = np.zeros((len(self._runs), len(tensors)), np.int64)
        both = np.zeros((len(self._pairs), len(tensors)), np.int64)
        expected = np.full((len(self._pairs), len(tensors)), np.nan)

        def tell() -> None:
            while self._read:
                told.more(*self._read.popleft())

        tasks = (Task(partial(self._tensor, facts), 1, math.prod(facts.shape)) for facts in tensors)
        for row, found in enumerate(in_order(tasks, threads, self._stop.set, tell)):
            counts[:, row], both[:, row], expected[:, row] = found
            tell()
        return tuple(
            PairCounts(i, j, counts[i], counts[j], both[k], expected[k]) for k, (i, j) in enumerate(self._pairs)
        )

    def _tensor(self, facts: TensorFacts) -> tuple[list[int], NDArray[np.int64], list[float]]:
        """Coordinates in each mask, in both masks of each pair, and expected there by magnitude alone."""
        masks = [run.masks[facts.name] for run in self._runs]
        counts = [mask.count for mask in masks]
        both = self._common(masks)
        bins = None
        if facts.compare != "bitwise" and self._base is not None:
            if facts.name in self._base:
                bins = self._by_magnitude(facts, self._base[facts.name], masks)
        elif facts.compare != "bitwise" and self._bitwise:
            bins = _by_octave(self._runs, facts.name)
        if bins is None:
            return counts, both, [math.nan] * len(self._pairs)
        rest = np.array([facts.numel, *counts]) - bins.sum(axis=1)
        return counts, both, [_expected(bins, rest, *pair) for pair in self._pairs]

    def _common(self, masks: Sequence[Mask]) -> NDArray[np.int64]:
        """How many coordinates each pair has in both masks."""
        total = np.zeros(len(self._pairs), np.int64)
        wanted = [
            any(masks[i].count and masks[j].count for i, j in self._pairs if index in (i, j))
            for index in range(len(masks))
        ]
        if not any(wanted):
            self._note(mask_chunks(masks[0].numel), masks[0].name)
            return total
        for pieces in zip(*(mask.iter_packed(_PIECE) for mask in masks), strict=True):
            for k, (i, j) in enumerate(self._pairs):
                if masks[i].count and masks[j].count:
                    total[k] += population(pieces[i] & pieces[j])
            self._note(mask_chunks(8 * pieces[0].size), masks[0].name)
        return total

    def _by_magnitude(self, facts: TensorFacts, tensor: Source, masks: Sequence[Mask]) -> NDArray[np.int64]:
        """Compared coordinates by the leading 15 bits of |W0| as stored or decoded, shape (1 + masks, 2^15)."""
        if tensor.shape != masks[0].shape:
            raise MaskError(
                "a mask does not fit the base",
                file=stored_parts(tensor)[0].shard.path,
                tensor=tensor.name,
                expected=masks[0].shape,
                found=tensor.shape,
            )
        pieces: Iterator[_Packed] = zip(*(mask.iter_packed(BLOCK // 8) for mask in masks), strict=True)
        weight: Weight = tensor
        if facts.rows is not None:
            weight = first_rows(tensor, facts.rows.compared)
        if facts.pieces and facts.compared is not None:
            region = Region(facts.shape, tuple(piece.base_index for piece in facts.pieces), facts.numel)
            weight, pieces = CommonPart(tensor, region), _inside(region, pieces)
        format = stored_format(tensor.dtype)
        shift = max(format.bits - 16, 0)
        bins = np.zeros((1 + len(masks), _MAGNITUDES), np.int64)
        # Rows that are not compared come last, and are in no mask.
        for stored, packed in zip(checked_blocks(self._shards, weight, self._known[facts.name]), pieces, strict=False):
            codes = stored.view(format.code_dtype)
            magnitudes = ((codes & format.code_dtype.type(format.magnitude)) >> shift).astype(np.uint16)
            bins[0] += np.bincount(magnitudes, minlength=_MAGNITUDES)
            for row, bits in enumerate(packed, 1):
                inside = np.unpackbits(bits, bitorder=BIT_ORDER, count=magnitudes.size).view(np.bool_)
                bins[row] += np.bincount(magnitudes[inside], minlength=_MAGNITUDES)
            self._note(1, tensor.name)
        return bins

    def _note(self, chunks: int, name: str) -> None:
        """Leave word of chunks that were read, for the thread that tells; end here if the count was given up."""
        if self._stop.is_set():
            raise InterruptedError("the count was given up")
        self._read.append((chunks, name))


def _inside(region: Region, blocks: Iterator[_Packed]) -> Iterator[_Packed]:
    """Of masks in blocks of their tensor the bits of a region, in blocks of its own."""
    first, left = 0, None
    for packed in blocks:
        stop = min(first + BLOCK, math.prod(region.shape))
        bits = np.unpackbits(np.stack(packed), axis=1, count=stop - first, bitorder=BIT_ORDER)
        found = bits[:, among(region, first, stop)]
        left, first = found if left is None else np.concatenate([left, found], axis=1), stop
        while left.shape[1] >= BLOCK:
            yield tuple(np.packbits(left[:, :BLOCK], axis=1, bitorder=BIT_ORDER))
            left = left[:, BLOCK:]
    if left is not None:
        yield tuple(np.packbits(left, axis=1, bitorder=BIT_ORDER))


def _by_octave(runs: Sequence[RunFile], name: str) -> NDArray[np.int64]:
    """Coordinates by floor(log2 |W0|): all, then those of each bitwise mask, shape (1 + runs, 279)."""
    rows = [run.histograms[name] for run in runs]
    return np.concatenate([rows[0].base, *(row.changed for row in rows)]).astype(np.int64)


def _expected(bins: NDArray[np.int64], rest: NDArray[np.int64], first: int, second: int) -> float:
    """Sum of n1 n2 / N over magnitudes; coordinates that no bin holds (NaN in the base) are one more."""
    everything = np.append(bins[0], rest[0]).astype(np.float64)
    ones, twos = (np.append(bins[1 + run], rest[1 + run]).astype(np.float64) for run in (first, second))
    return float(np.divide(ones * twos, everything, out=np.zeros_like(everything), where=everything > 0).sum())
