"""Values are compared as unchanged_stored compares them; the oracle widens everything with NumPy."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ckptdiff.checkpoint import open_checkpoint
from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.checkpoint.same_values import same_values
from ckptdiff.errors import CheckpointError
from ckptdiff.events import Stage, ignore
from ckptdiff.measure.partial import BLOCK

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


def write(path: Path, tensors: Sequence[tuple[str, np.ndarray]]) -> None:
    header, end = {}, 0
    for index, (dtype, array) in enumerate(tensors):
        start, end = end, end + array.nbytes
        header[str(index)] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for _, array in tensors))


def same(path: Path, one: tuple[str, np.ndarray], other: tuple[str, np.ndarray], block: int = BLOCK) -> bool:
    write(path, [one, other])
    first, second = open_checkpoint(path).tensors.values()
    with open_shards("pread") as shards:
        found = same_values(shards, first, second, Stage(ignore, "looking"), block)
        assert same_values(shards, second, first, Stage(ignore, "looking"), block) == found
        return found


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations_with_replacement(DTYPES, 2)])
def test_dtypes(tmp_path: Path, one: str, other: str) -> None:
    values = np.array([0.0, -0.0, 1.0, -1.5, 0.25, np.nan, 2.0, 0.0078125])
    a, b = values.astype(DTYPES[one]), values.astype(DTYPES[other])
    b[:2] = b[1::-1].copy()  # the signs of the zeros
    assert same(tmp_path / "x", (one, a), (other, b))
    for place in range(len(values)):
        changed = b.copy()
        changed[place] = DTYPES[other](0.5)
        assert not same(tmp_path / "x", (one, a), (other, changed))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F8_E5M2"])
def test_a_nan_equals_one_of_the_same_bits(tmp_path: Path, dtype: str) -> None:
    code = np.dtype(f"u{np.dtype(DTYPES[dtype]).itemsize}")
    quiet = np.array([np.nan], DTYPES[dtype]).view(code)
    assert same(tmp_path / "x", (dtype, quiet), (dtype, quiet))
    assert not same(tmp_path / "x", (dtype, quiet), (dtype, quiet ^ code.type(1)))


def test_what_the_narrower_dtype_cannot_hold_differs(tmp_path: Path) -> None:
    exact = np.array([1.0, 1 + 2**-20], np.float32)
    assert not same(tmp_path / "x", ("F32", exact), ("BF16", exact.astype(ml_dtypes.bfloat16)))
    assert not same(tmp_path / "x", ("F64", exact.astype(np.float64) + 2.0**-40), ("F32", exact))
    assert not same(tmp_path / "x", ("F16", np.array([2.0**-24], np.float16)), ("F8_E4M3", np.zeros(1, np.uint8)))


@pytest.mark.parametrize("other", ["BF16", "F32"])
@pytest.mark.parametrize("place", [None, 0, 999, 1000, 2499])
def test_every_block_is_looked_at(tmp_path: Path, other: str, place: int | None) -> None:
    head = np.random.default_rng(0).normal(size=(50, 50)).astype(ml_dtypes.bfloat16)
    embedding = head.astype(DTYPES[other])
    if place is not None:
        embedding.reshape(-1)[place] += DTYPES[other](1)
    assert same(tmp_path / "x", ("BF16", head), (other, embedding), 1000) == (place is None)


def test_empty_tensors_are_equal(tmp_path: Path) -> None:
    empty = np.zeros((0, 4), np.float32)
    assert same(tmp_path / "x", ("F32", empty), ("F16", empty.astype(np.float16)))


def test_reading_ends_at_the_first_difference(tmp_path: Path) -> None:
    read = []

    class Counting(dict):  # type: ignore[type-arg]
        def window(self, tensor, start, stop, buffer):  # type: ignore[no-untyped-def]
            read.append(start)
            return shards[tensor.shard].window(tensor, start, stop, buffer)

        def __missing__(self, shard):  # type: ignore[no-untyped-def]
            return self

    write(tmp_path / "x", [("F32", np.arange(100, dtype=np.float32)), ("F32", np.ones(100, np.float32))])
    first, second = open_checkpoint(tmp_path / "x").tensors.values()
    with open_shards("pread") as shards:
        assert not same_values(Counting(), first, second, Stage(ignore, "looking"), 4)  # type: ignore[arg-type]
        assert len(read) == 2
        read.clear()
        assert same_values(Counting(), first, first, Stage(ignore, "looking"), 4)  # type: ignore[arg-type]
        assert read == [], "the same bytes"


def test_a_shard_that_changed_is_an_error(tmp_path: Path) -> None:
    one = ("F32", np.ones(4, np.float32))
    write(tmp_path / "x", [one, one])
    first, second = open_checkpoint(tmp_path / "x").tensors.values()
    write(tmp_path / "x", [one, one, one])
    with pytest.raises(CheckpointError, match="changed") as caught, open_shards("pread") as shards:
        same_values(shards, first, second, Stage(ignore, "looking"))
    assert caught.value.file == str(tmp_path / "x")
