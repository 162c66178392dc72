"""Gather what is known of a run before its data is read: of each pair, of both sides, of what is left out."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

import ckptdiff
from ckptdiff.checkpoint import Checkpoint, Kind, Pairing, Place, TensorPair, locate_all
from ckptdiff.checkpoint.weights import Piece, Source, stored_as
from ckptdiff.errors import plural
from ckptdiff.figures.catalogue import COLUMNS
from ckptdiff.figures.coverage import by_pattern
from ckptdiff.figures.result import SIDES, Diff, PieceFacts, RowCounts, Side, TensorFacts, UnmatchedTensor
from ckptdiff.formats import formats_of
from ckptdiff.options import Options
from ckptdiff.report.text import percent
from ckptdiff.run.left_out import left_out


def facts_of_run(base: Checkpoint, tuned: Checkpoint, pairing: Pairing, options: Options) -> Diff:
    """Make a result of everything that needs no data; its columns have length zero."""
    groups = options.group_patterns()
    shapes = {name: weight.shape for name, weight in pairing.weights[0].items()}
    shapes |= {pair.name: pair.shape for pair in pairing.pairs if pair.name not in shapes}
    places = locate_all(shapes)
    diff = Diff(
        tensors=tuple(_tensor_facts(pair, places[pair.name], options, groups) for pair in pairing.pairs),
        columns={column.name: np.zeros(0, column.dtype) for column in COLUMNS},
        base=_side_facts(base, "base", pairing),
        tuned=_side_facts(tuned, "tuned", pairing),
        compare=options.compare,
        mask_rule=str(options.mask),
        options=options.as_json(),
        ckptdiff_version=ckptdiff.__version__,
        only_in_base=pairing.only_in_base,
        only_in_tuned=pairing.only_in_tuned,
        aliased=tuple((alias.name, alias.of) for alias in pairing.aliased),
        mismatched=tuple(
            UnmatchedTensor(bad.name, _dtype_and_shape(bad.base), _dtype_and_shape(bad.tuned), bad.reason)
            for bad in pairing.mismatched
        ),
        suggested_map=pairing.suggested.rules,
        warnings=(*base.warnings, *tuned.warnings, *pairing.warnings),
    )
    little = (
        f"less than half of {side} is compared: {percent(found.share)} of its values"
        for side, found in diff.coverage.items()
        if found.share is not None and found.share < 0.5
    )
    unread = diff.counts["unread"]
    quick = (
        f"{plural(unread, 'tensor')} known to be the same, not read (--quick): figures of W0's values are unknown",
    )
    return replace(diff, warnings=(*diff.warnings, *little, *(quick if unread else ())))


def _tensor_facts(pair: TensorPair, place: Place, options: Options, groups: list[tuple[str, Any]]) -> TensorFacts:
    name, base, tuned, plain = pair.name, pair.base, pair.tuned, pair.stored
    facts = TensorFacts(
        name,
        base.shape if plain else pair.shape,
        stored_as(base),
        stored_as(tuned),
        _compared_as(base.kind, base.dtype, tuned.dtype, options.compare),
        place.layer,
        place.tower,
        place.module_type,
        place.block,
        None if tuned.name == name else tuned.name,
        tuple(group for group, pattern in groups if pattern.search(name)) if groups else (),
        pair.same_bytes,
        options.quick and pair.known_equal,
    )
    if plain:
        return facts
    return replace(
        facts,
        pieces=tuple(map(_piece_facts, pair.pieces)),
        rows=None if pair.rows is None else RowCounts(*pair.rows),
        untied=pair.untied,
        compared=_compared(pair),
    )


@cache
def _compared_as(kind: Kind, base: str, tuned: str, compare: str) -> str:
    return formats_of(base, tuned, compare)[2].name if kind is Kind.FLOAT else "bitwise"


def _piece_facts(piece: Piece) -> PieceFacts:
    return PieceFacts(piece.source.name, piece.base_index, piece.tuned_index, piece.transposed)


def _compared(pair: TensorPair) -> tuple[int, int] | None:
    """Values of each side, if they are not all of the base's tensor: those of an embedding are counted as its own."""
    numel = pair.base.numel
    if pair.untied:
        return (numel, 0) if pair.base.name == pair.name else (0, numel)
    return None if numel == math.prod(pair.shape) else (numel, numel)


def _side_facts(side: Checkpoint, called: Side, pairing: Pairing) -> dict[str, Any]:
    assumed = [alias.name for alias in pairing.aliased if alias.side == called and alias.by == "config"]
    tied, others = left_out(pairing, called)
    weights, numel = pairing.weights[SIDES.index(called)], side.numel
    dtypes = Counter[str]()
    for (dtype, _), count in side.kinds.items():
        dtypes[dtype] += count
    return {
        "path": side.path,
        "tensors": len(side.tensors),
        "numel": numel,
        "values": numel if weights is side.tensors else sum(weight.numel for weight in weights.values()),
        "bytes": side.nbytes,
        "dtypes": dict(sorted(dtypes.items())),
        "shards": [
            {"file": shard.path, "size": shard.size, "mtime_ns": shard.mtime_ns, "header_sha256": shard.header_sha256}
            | ({"etag": shard.remote.version.etag} if shard.remote else {})
            for shard in side.shards
        ],
        **side.origin,
        "uncompared": [*side.unread, *assumed],
        "tied": tied,
        "left_out": by_pattern(others),
    }


def _dtype_and_shape(weight: Source) -> dict[str, Any]:
    return {"dtype": stored_as(weight), "shape": list(weight.shape)}
