"""A tensor that is put together of pieces is read as NumPy puts it together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ckptdiff.checkpoint import open_checkpoint
from ckptdiff.checkpoint.boxes import is_contiguous, read_elements, runs_of
from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.checkpoint.weights import Assembled, Piece
from ckptdiff.errors import ChangedFileError


def whole(*shape: int) -> tuple[tuple[int, int, int], ...]:
    return tuple((0, size, 1) for size in shape)


def expected(weight: Assembled, arrays: dict[str, Any]) -> np.ndarray:
    out = np.zeros(weight.shape, next(iter(arrays.values())).dtype)
    for piece in weight.pieces:
        box = arrays[piece.source.name][tuple(slice(*axis) for axis in piece.tuned_index)]
        box = np.swapaxes(box, -1, -2) if piece.transposed else box
        target = out[tuple(slice(*axis) for axis in piece.base_index)]
        target[:] = box.reshape(target.shape)
    return out


def read(weight: Any, first: int, stop: int, itemsize: int) -> bytes:
    room = np.empty((stop - first) * itemsize, np.uint8)
    with open_shards("pread") as shards:
        read_elements(shards, weight, first, stop, room)
    return room.tobytes()


def layouts(e: int, i: int, h: int) -> dict[str, tuple[dict[str, tuple[int, ...]], Any]]:
    """By name: shapes of the stored tensors, and what makes the base's tensor of them."""
    fused = {"f": (e, 2 * i, h)}
    swapped = {"f": (e, h, 2 * i)}
    split = {f"{e_}.{part}": (i, h) for e_ in range(e) for part in ("gate", "up")}
    return {
        "a part of a fused tensor": (
            fused,
            lambda t: ((i, h), [(t["f"], whole(i, h), ((e - 1, e, 1), (i, 2 * i, 1), (0, h, 1)), False)]),
        ),
        "fused of parts": (
            split,
            lambda t: (
                (e, 2 * i, h),
                [
                    (t[f"{n}.{part}"], ((n, n + 1, 1), (k * i, k * i + i, 1), (0, h, 1)), whole(i, h), False)
                    for n in range(e)
                    for k, part in enumerate(("gate", "up"))
                ],
            ),
        ),
        "a column in two of a transposed tensor": (
            swapped,
            lambda t: ((i, h), [(t["f"], whole(i, h), ((0, 1, 1), (0, h, 1), (1, 2 * i, 2)), True)]),
        ),
        "transposed and interleaved of parts": (
            split,
            lambda t: (
                (e, h, 2 * i),
                [
                    (t[f"{n}.{part}"], ((n, n + 1, 1), (0, h, 1), (k, 2 * i, 2)), whole(i, h), True)
                    for n in range(e)
                    for k, part in enumerate(("gate", "up"))
                ],
            ),
        ),
        "swapped axes of all": (
            swapped,
            lambda t: ((e, 2 * i, h), [(t["f"], whole(e, 2 * i, h), whole(e, h, 2 * i), True)]),
        ),
        "rows one by one": (
            fused,
            lambda t: ((e, i, h), [(t["f"], whole(e, i, h), ((0, e, 1), (0, 2 * i, 2), (0, h, 1)), False)]),
        ),
        "a bias of parts": (
            {"q": (i,), "k": (h,)},
            lambda t: (
                (i + h,),
                [(t["q"], ((0, i, 1),), whole(i), False), (t["k"], ((i, i + h, 1),), whole(h), False)],
            ),
        ),
        "rows of a matrix of biases": (
            {"f": (e, i)},
            lambda t: ((i,), [(t["f"], whole(i), ((e - 1, e, 1), (0, i, 1)), False)]),
        ),
    }


@settings(max_examples=40, deadline=None)
@given(
    e=st.integers(1, 4),
    i=st.integers(1, 9),
    h=st.integers(1, 12),
    dtype=st.sampled_from([np.uint8, np.uint16, np.float32, np.float64]),
    data=st.data(),
)
def test_any_elements_of_any_layout(
    tmp_path_factory: pytest.TempPathFactory, e: int, i: int, h: int, dtype: Any, data: st.DataObject
) -> None:
    for what, (shapes, make) in layouts(e, i, h).items():
        rng = np.random.default_rng(0)
        arrays = {name: rng.integers(0, 250, shape).astype(dtype) for name, shape in shapes.items()}
        path = tmp_path_factory.mktemp("boxes") / "t.safetensors"
        save_file(arrays, path)
        tensors = open_checkpoint(path).tensors
        shape, pieces = make(tensors)
        weight = Assembled("x", next(iter(tensors.values())).dtype, shape, tuple(Piece(*piece) for piece in pieces))
        right = expected(weight, arrays).reshape(-1)
        first, stop = sorted(data.draw(st.tuples(st.integers(0, right.size), st.integers(0, right.size)), label=what))
        assert read(weight, 0, right.size, right.itemsize) == right.tobytes(), what
        assert read(weight, first, stop, right.itemsize) == right[first:stop].tobytes(), what
        if is_contiguous(weight) and first < stop:
            got = np.concatenate(
                [
                    arrays[run.tensor.name].reshape(-1)[run.start : run.start + run.numel]
                    for run in runs_of(weight, first, stop)
                ]
            )
            assert got.tobytes() == right[first:stop].tobytes(), what


def test_what_is_long_and_in_one_piece_is_left_to_compiled_code(tmp_path: Path) -> None:
    for (i, h), contiguous in (((64, 100), {"a part of a fused tensor", "fused of parts"}), ((16, 100), set())):
        for what, (shapes, make) in layouts(3, i, h).items():
            if "bias" in what:
                continue
            save_file({name: np.zeros(shape, np.uint16) for name, shape in shapes.items()}, tmp_path / "t.safetensors")
            shape, pieces = make(open_checkpoint(tmp_path / "t.safetensors").tensors)
            weight = Assembled("x", "U16", shape, tuple(Piece(*piece) for piece in pieces))
            alone = math.prod(shape) == i * h and what in {"a part of a fused tensor"}
            assert is_contiguous(weight) == (what in contiguous or alone), what


def test_a_box_of_a_file_that_was_cut(tmp_path: Path) -> None:
    shapes, make = layouts(2, 40, 50)["a column in two of a transposed tensor"]
    path = tmp_path / "t.safetensors"
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, path)
    shape, pieces = make(open_checkpoint(path).tensors)
    weight = Assembled("x", "F32", shape, tuple(Piece(*piece) for piece in pieces))
    with path.open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(ChangedFileError, match="changed"):
        read(weight, 0, 2000, 4)
