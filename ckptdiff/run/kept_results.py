"""Keep what tasks gave, and find it again in a later run: the same tasks give the same, to the last bit."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np

from ckptdiff.checkpoint.kept import Kept
from ckptdiff.files.packed_entry import Unpacked, pack, unpack
from ckptdiff.files.unfinished import Unfinished
from ckptdiff.measure.partial import Partial, Refined
from ckptdiff.measure.records import Records
from ckptdiff.run.planning import Plan
from ckptdiff.run.tasks import SpanTask, plan_tasks
from ckptdiff.run.worker import CommonBits, MaskChunks, Result

_COUNTED = "counts", "within", "sums", "max_abs", "span", "ulp"
"""Arrays of a Partial that are kept whole."""
_REFINED = "deltas", "weights", "within", "tails"
_SPAN = re.compile(r"tensor (\d+), blocks (\d+)-(\d+), pass (\d+)")


class KeptResults:
    """The results of tasks in the folder of an unfinished run."""

    def __init__(self, unfinished: Unfinished) -> None:
        self._unfinished = unfinished
        self._spans: defaultdict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for found in filter(None, map(_SPAN.fullmatch, unfinished.keys())):
            tensor, first, stop, turn = map(int, found.groups())
            self._spans[tensor, turn].append((first, stop))

    def spans(self, tensor: int, turn: int) -> list[tuple[int, int]]:
        """From which block to which there are results of a pass over a tensor, in order; they do not overlap.

        Other hands may have done the tensor in other spans.
        """
        taken: list[tuple[int, int]] = []
        for first, stop in sorted(self._spans.get((tensor, turn), ()), key=lambda span: (span[0], -span[1])):
            if not taken or first >= taken[-1][1]:
                taken.append((first, stop))
        return taken

    def has(self, task: SpanTask, turn: int) -> bool:
        """Whether an earlier run kept what a task gave, unless it turns out to be damaged."""
        return key_of(task, turn) in self._unfinished

    def find(self, task: SpanTask, turn: int, blank: Callable[[], Partial]) -> Result | None:
        """What a task gave in an earlier run, in its pass over the tensor that is the `turn`-th from 0."""
        found = self._unfinished.find(key_of(task, turn))
        return None if found is None else result_of(unpack(found), task, blank)

    def keep(self, task: SpanTask, turn: int, result: Result) -> None:
        """Keep what a task gave, before anyone merges it."""
        self.keep_packed(task, turn, packed_result(result))

    def keep_packed(self, task: SpanTask, turn: int, parts: Sequence[bytes]) -> None:
        """Keep what a task gave as :func:`packed_result` packs it."""
        self._unfinished.keep(key_of(task, turn), parts)

    def nbytes(self, plan: Plan) -> int:
        """How many of the bytes to read need not be, as far as the plan tells."""
        found = 0
        for task in plan_tasks(plan.loads, plan.grain, lambda index: self.spans(index, 0)):
            if not self.has(task, 0):
                continue
            passes = 1 if task.span is None else plan.measurement(task.span.tensor, plan.want_masks).passes
            turns = 1 if task.span is None else sum(self.has(task, turn) for turn in range(passes))
            found += task.nbytes(plan.loads) * turns // passes
        return found


def key_of(task: SpanTask, turn: int) -> str:
    """Name of what a task gives; all passes over small tensors are one task."""
    if task.span is None:
        return f"tensors {task.tensors.start}-{task.tensors.stop}"
    return f"tensor {task.span.tensor}, blocks {task.span.first}-{task.span.stop}, pass {turn}"


def packed_result(result: Result) -> list[bytes]:
    """A result as the parts of an entry."""
    facts: dict[str, Any] = {
        "compared": result.compared,
        "unchanged": result.unchanged,
        "masks": [
            (mask.tensor, mask.first, [kind for _, kind in mask.chunks])
            if isinstance(mask, MaskChunks)
            else (mask.tensor, mask.numel, None)
            for mask in result.masks
        ],
        "kept": [(tensor, astuple(kept)) for tensor, kept in result.kept.items()],
        "odd": sorted(result.odd),
    }
    found = result.found
    if result.records is not None:
        arrays = result.records._asdict()
    elif isinstance(found, Refined):
        arrays = {name: getattr(found, name) for name in _REFINED}
    else:
        assert found is not None
        facts["numel"] = found.numel
        first, last, lowest, highest = found.span.tolist()
        arrays = {name: getattr(found, name) for name in _COUNTED}
        arrays |= {"weights": found.weights[:, first : last + 1], "deltas": found.deltas[:, lowest : highest + 1]}
    payloads: list[bytes] = []
    for mask in result.masks:
        payloads += [payload for payload, _ in mask.chunks] if isinstance(mask, MaskChunks) else [mask.packed.tobytes()]
    return pack(facts, arrays, payloads)


def result_of(entry: Unpacked, task: SpanTask, blank: Callable[[], Partial]) -> Result:
    """The result of a task from its entry; `blank` makes a Partial in which nothing is seen yet."""
    facts, arrays, payloads = entry
    following = iter(payloads)
    masks: list[MaskChunks | CommonBits] = [
        CommonBits(tensor, np.frombuffer(next(following), np.uint8), first)
        if kinds is None
        else MaskChunks(tensor, first, [(next(following), kind) for kind in kinds])
        for tensor, first, kinds in facts["masks"]
    ]
    result = Result(task.tensors, task.span, None, masks, facts["compared"], facts["unchanged"])
    result.kept = {tensor: Kept(*counts) for tensor, counts in facts["kept"]}
    result.odd = {(path, tensor, what, weight) for path, tensor, what, weight in facts["odd"]}
    if task.span is None:
        result.records = Records(**arrays)
    elif "numel" not in facts:
        result.found = Refined(**arrays)
    else:
        partial = result.found = blank()
        partial.numel = facts["numel"]
        first, last, lowest, highest = arrays["span"].tolist()
        partial.weights[:, first : last + 1] = arrays.pop("weights")
        partial.deltas[:, lowest : highest + 1] = arrays.pop("deltas")
        for name, values in arrays.items():
            setattr(partial, name, values)
    return result
