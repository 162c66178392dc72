"""The result of any task comes back from what was kept of it, bit for bit."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptdiff.checkpoint.kept import Kept
from ckptdiff.files.packed_entry import unpack
from ckptdiff.measure.partial import BINS, Partial, Refined, Targets
from ckptdiff.measure.records import Records, empty_records
from ckptdiff.run.kept_results import packed_result, result_of
from ckptdiff.run.tasks import Span, SpanTask
from ckptdiff.run.worker import MaskChunks, Result

SPANNING = SpanTask(range(7, 8), Span(7, 3, 5))
WHOLE = SpanTask(range(2, 5))

kept = st.builds(Kept, st.integers(0), *[st.none() | st.integers(0)] * 3, st.integers(0), st.integers(0))
chunks = st.lists(st.tuples(st.binary(max_size=40), st.integers(0, 1)))
masks = st.lists(st.builds(MaskChunks, st.integers(0, 9), st.integers(0, 99), chunks))
odd = st.sets(st.tuples(*[st.text(max_size=4)] * 4), max_size=3)


def filled(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """Values of any bits, of the dtype and shape of an array."""
    if values.dtype == bool:
        return rng.random(values.shape) < 0.5
    return np.frombuffer(rng.bytes(values.nbytes), values.dtype).reshape(values.shape).copy()


def partial_of(rng: np.random.Generator, first: int, last: int) -> Partial:
    partial = Partial(int(rng.integers(1 << 40)))
    partial.open_blocks(2, 3)
    for name in ("counts", "within", "sums", "max_abs", "ulp"):
        setattr(partial, name, filled(rng, getattr(partial, name)))
    partial.span[:] = first, last, BINS, -1
    partial.weights[:, first : last + 1] = rng.integers(1 << int(rng.integers(1, 50)), size=(3, last + 1 - first))
    if rng.random() < 0.5:
        partial.span[2:] = 5, 9
        partial.deltas[:, 5:10] = filled(rng, partial.deltas[:, 5:10])
    return partial


def refined_of(rng: np.random.Generator) -> Refined:
    refined = Refined.empty(Targets(16, (1, 2), (3,), (0.5,), (0.25, 0.5)))
    refined.open_blocks(2)
    return Refined(*(filled(rng, getattr(refined, field.name)) for field in fields(Refined)))


def used() -> Partial:
    """One that had other contents, as those have that are used again."""
    partial = partial_of(np.random.default_rng(0), 0, BINS - 1)
    partial.clear()
    return partial


def bits(found: Any) -> dict[str, Any]:
    """Everything in a result, arrays as their dtype, shape and bytes."""
    if isinstance(found, np.ndarray):
        return {"dtype": found.dtype, "shape": found.shape, "bytes": found.tobytes()}
    names = found._fields if isinstance(found, Records) else [field.name for field in fields(found)]
    parts = {name: getattr(found, name) for name in names}
    deep = np.ndarray | Partial | Refined | Records
    return {name: bits(part) if isinstance(part, deep) else part for name, part in parts.items()}


@settings(max_examples=25)
@given(
    st.sampled_from(["partial", "refined", "records"]),
    st.integers(0, 2**32),
    st.lists(st.integers(0, BINS - 1), min_size=2, max_size=2).map(sorted),
    masks,
    st.dictionaries(st.integers(0, 9), kept),
    odd,
)
def test_a_result_comes_back(
    kind: str, seed: int, used_bins: list[int], made: list[MaskChunks], common: dict[int, Kept], strange: set[Any]
) -> None:
    rng = np.random.default_rng(seed)
    task = WHOLE if kind == "records" else SPANNING
    result = Result(task.tensors, task.span, None, made, seed, seed // 2, None, common, strange)
    if kind == "records":
        result.records = Records(*(filled(rng, values) for values in empty_records(3)))
    else:
        result.found = partial_of(rng, *used_bins) if kind == "partial" else refined_of(rng)
    packed = b"".join(packed_result(result))
    assert bits(result_of(unpack(packed), task, used)) == bits(result)


def test_the_bins_in_use_alone_take_room() -> None:
    partial = partial_of(np.random.default_rng(1), 100, 200)
    result = Result(SPANNING.tensors, SPANNING.span, partial)
    assert sum(map(len, packed_result(result))) < 10_000
