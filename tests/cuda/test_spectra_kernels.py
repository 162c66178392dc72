"""The kernels of the spectra, beside NumPy: panels of every format both ways, what is counted, and sums of squares."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from code_samples import random_codes, tuned_codes
from host_kernels import QUICK, TESTED, Library

from ckptdiff.formats import FORMATS

DTYPES = {
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "f8_e4m3": ml_dtypes.float8_e4m3fn,
    "f8_e5m2": ml_dtypes.float8_e5m2,
}
EACH = [pytest.param(names, marks=[] if names in QUICK else pytest.mark.slow, id="-".join(names)) for names in TESTED]
SHAPES = [(1, 1), (33, 65), (70, 31), (3, 200)]
BF16 = ("bf16", "bf16", "bf16")


def values(codes: np.ndarray, stored: str, compare: str, real: Any) -> np.ndarray:
    """What codes stand for once they are cast."""
    found = codes.view(DTYPES[stored])
    with np.errstate(over="ignore", invalid="ignore"):
        if compare == "bf16":  # of float64 too, by way of float32
            found = found.astype(np.float32)
        return found.astype(DTYPES[compare]).astype(real)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("names", EACH)
@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("turned", [False, True], ids=["as stored", "turned"])
def test_panels(libraries: Any, names: tuple[str, str, str], real: Any, turned: bool) -> None:
    library, rng = libraries(*names), np.random.default_rng(5)
    for rows, columns in SHAPES:
        for kind in ("tame", "wild"):
            base = random_codes(FORMATS[names[0]], rows * columns, rng, kind)
            tuned = tuned_codes(base, FORMATS[names[0]], FORMATS[names[1]], rows * columns, rng, kind)
            line = (rows if turned else columns) + 5  # a part of longer rows
            height = columns if turned else rows
            weights, deltas = (np.full((height, line), 77, real) for _ in range(2))
            sides = [side.view(np.uint8) for side in (base, tuned)]
            sizes = [
                np.uint64(rows),
                np.uint64(columns),
                np.uint64(line),
                np.uint32(turned),
                np.uint64(0),
                np.uint64(0),
            ]
            launch(library, "panel", real, [[sides[0]], [sides[1]], *sizes, [weights], [deltas]], seed=rows)
            known = values(base, names[0], names[2], real).reshape(rows, columns)
            with np.errstate(over="ignore"):
                moved = values(tuned, names[1], names[2], real).reshape(rows, columns) - known
            for found, expected in ((weights, known), (deltas, moved)):
                part = found[:, : line - 5]
                np.testing.assert_array_equal(part, expected.T if turned else expected)
                assert (found[:, line - 5 :] == 77).all()


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize(("first", "stop"), [(0, 63), (5, 40), (20, 21), (30, 63)])
def test_panels_of_a_stack(libraries: Any, real: Any, first: int, stop: int) -> None:
    """Three matrices of 21 rows, of which a block holds some whole, some in part: each lies turned in its own place."""
    rng, height, width = np.random.default_rng(first), 21, 70
    base, tuned = (random_codes(FORMATS["bf16"], 3 * height * width, rng, "tame").reshape(-1, width) for _ in range(2))
    weights, deltas = (np.full((3, width, height), 77, real) for _ in range(2))
    sides = [np.ascontiguousarray(side[first:stop]).view(np.uint8) for side in (base, tuned)]
    sizes = [np.uint64(stop - first), np.uint64(width), np.uint64(height), np.uint32(True)]
    sizes += [np.uint64(first), np.uint64(height * width)]
    launch(libraries(*BF16), "panel", real, [[sides[0]], [sides[1]], *sizes, [weights], [deltas]], seed=first)
    known = [values(np.ascontiguousarray(side), "bf16", "bf16", real) for side in (base, tuned)]
    for found, side in ((weights, known[0]), (deltas, known[1] - known[0])):
        expected = np.full((3 * height, width), 77, real)
        expected[first:stop] = side.reshape(-1, width)[first:stop]
        np.testing.assert_array_equal(found, expected.reshape(3, height, width).swapaxes(1, 2))


def launch(library: Library, kernel: str, real: Any, args: list[Any], seed: int = 0, blocks: int = 3) -> None:
    library.launch(f"{kernel}_{np.dtype(real).name}", blocks, args, seed)


def entries(real: Any, numel: int = 3001) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, weights and updates: zeros of both signs, subnormal numbers, and what float32 does not hold."""
    rng = np.random.default_rng(1)
    scores, base, delta = rng.standard_normal((3, numel)) * np.array([[1], [0.02], [1e-5]])
    delta[rng.random(numel) < 0.4] = 0.0
    delta[:5] = -0.0, 1e-40, -1e-44, np.inf, 1e-5
    base[:5] = 0.0, -0.0, 1e-39, -1e-40, np.inf
    if real == np.float64:
        delta[5:7] = 1e-60, 1e60
        base[7:9] = 1e-60, -1e60
    with np.errstate(over="ignore"):
        return scores.astype(real), base.astype(real), delta.astype(real)


def singles(side: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.abs(side.astype(np.float32))


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_magnitudes(libraries: Any, real: Any) -> None:
    """Of two matrices, by two blocks each."""
    _, base, delta = (np.stack([side, side[::-1] * (side < 0.5)]) for side in entries(real))
    counts = np.zeros((2, 3, 1 << 15), np.int64)
    threshold = np.float32(1e-5)
    for _ in range(2):
        sizes = [np.uint64(base.shape[1]), np.uint32(2), threshold.view(np.uint32)]
        launch(libraries(*BF16), "magnitudes", real, [[base], [delta], *sizes, [counts]], blocks=4)
    for found, weights, changes in zip(counts, base, delta, strict=True):
        bins, sizes = singles(weights).view(np.uint32) >> 16, singles(changes)
        for counted, chosen in zip(found, (sizes >= 0, sizes > 0, sizes > threshold), strict=True):
            np.testing.assert_array_equal(counted, 2 * np.bincount(bins[chosen], minlength=1 << 15))


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize(("shift", "bins"), [(16, 1 << 15), (12, 1 << 11), (8, 300), (0, 40)])
def test_scores(libraries: Any, real: Any, shift: int, bins: int) -> None:
    """Of three matrices, of which the last has fewer bins, and the second none."""
    scores, base, delta = (np.stack([side, side, side[::-1]]) for side in entries(real))
    start = int(np.float32(0.8).view(np.uint32)) >> shift if shift < 16 else 0
    chances = np.random.default_rng(2).integers(0, (1 << 31) + 1, (3, 1 << 15)).astype(np.uint32)
    threshold, room, counts = np.float32(1e-5), bins + 3, np.zeros((3, bins + 4, 8), np.int64)
    low = 0x3C80, 0, 0x3B00
    opened = bins, 0, bins // 2
    windows = np.array([[shift, start, opened[member], low[member]] for member in range(3)], np.uint32)
    sizes = [np.uint64(base.shape[1]), np.uint32(3)]
    args = [[scores], [base], [delta], *sizes, [windows], np.uint32(room), threshold.view(np.uint32)]
    launch(libraries(*BF16), "scores", real, [*args, [chances], [counts]], seed=shift, blocks=6)
    for member in range(3):
        expected = np.zeros((room + 1, 8), np.int64)
        if opened[member]:
            sides = scores[member], base[member], delta[member]
            counted_scores(expected, *sides, shift, start, opened[member], low[member], chances[member])
        np.testing.assert_array_equal(counts[member], expected)


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 3), (8, 70), (50, 200)])
def test_squares(libraries: Any, real: Any, rows: int, columns: int) -> None:
    """Of three matrices, seven rows at a time, one after the other: those of float32 to the last digit."""
    values = np.random.default_rng(rows).standard_normal((3, rows, columns)) * np.logspace(-15, 15, columns)
    values = values.astype(real)
    parts = -(-rows // 7)
    expected, found = np.zeros((3, parts, columns)), np.full((3, parts, columns), 77.0)
    for row in range(rows):
        expected[:, row // 7] += values[:, row].astype(np.float64) ** 2
    sizes = [np.uint64(rows), np.uint64(columns), np.uint64(3), np.uint64(7)]
    launch(libraries(*BF16), "squares", real, [[values], *sizes, [found]], seed=rows)
    np.testing.assert_allclose(found, expected, rtol=0 if real == np.float32 else 1e-14)


def counted_scores(
    expected: np.ndarray,
    scores: np.ndarray,
    base: np.ndarray,
    delta: np.ndarray,
    shift: int,
    start: int,
    bins: int,
    low: int,
    chances: np.ndarray,
) -> None:
    """What the kernel should count of a matrix."""
    places = (singles(scores).view(np.uint32) >> shift).astype(np.int64) - start
    inside = places >= 0
    places, weights, sizes = np.minimum(places, bins), singles(base).view(np.uint32) >> 16, singles(delta)
    changed, above, beyond, tied = sizes > 0, sizes > np.float32(1e-5), weights > low, weights == low
    fields = (
        np.ones(base.size, np.int64),
        *(changed, above, changed & beyond, above & beyond, changed & tied, above & tied),
        chances[weights],
    )
    for column, field in enumerate(fields):
        np.add.at(expected[:, column], places[inside], field[inside].astype(np.int64))
