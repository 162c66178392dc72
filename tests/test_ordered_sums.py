"""Sums of floats: bit by bit those of NumPy in the order that is promised, with all instructions a processor has."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numpy.typing import NDArray
from patience import PATIENCE

from ckptdiff.codes.differences import PRODUCT_SUMS, add_products, add_squared_products, differences, put_reals
from ckptdiff.codes.lanes import LANES, SUMS, add_squares, load_codes
from ckptdiff.codes.ordered_sums import sum_of_squares, sums_of_absorbed, sums_of_changes
from ckptdiff.formats import FORMATS
from ckptdiff.kernel_library import LEVELS, has_level
from ckptdiff.measure.cpu import CpuBackend
from ckptdiff.measure.partial import Partial, Scan, Sum
from ckptdiff.measure.source import InMemory

Floats = NDArray[Any]

SIZES = (*range(36), 63, 64, 65, 2047, 2048, 2063, 2064, 2069, 4099, (1 << 16) + 3)
FLOATS = (np.float32, np.float64)
ABSORBED = tuple((real, code) for real in FLOATS for code in (np.uint16, np.uint32))
FOLLOWED = (np.uint16, np.uint32, np.uint64)
TILE = 1 << 16

compiled = numba.njit(error_model="numpy")


@compiled
def changes(base, delta):
    return sums_of_changes(base, delta)


@compiled
def squares(values):
    return (sum_of_squares(values),)


@compiled
def absorbed(x, y, a, b):
    return sums_of_absorbed(x, y, a, b)


@compiled
def followed(codes, sums, products, room):
    for i in range(0, codes.shape[1], LANES):
        base, new = load_codes(codes, 0, i), load_codes(codes, 1, i)
        add_squares(sums, 0, base, new)
        delta = differences(base, new)
        put_reals(room, 0, delta)
        add_products(products, 0, delta, room, 0)
        add_squared_products(products, 1, delta, room, 0)


def summed(terms: Floats) -> Floats:
    """The sum of float64 terms in the order that is promised."""
    total, at = np.float64(0), 0
    for apart in (16, 4, 1):
        sums = np.zeros(apart)
        sums[0] = total
        whole = (terms.size - at) // apart * apart
        for some in terms[at : at + whole].reshape(-1, apart):
            sums += some
        at += whole
        if apart == 16:
            a, b, c, d = sums.reshape(4, 4)
            sums = (a + b) + (c + d)
        total = sums[0] if apart == 1 else (sums[0] + sums[2]) + (sums[1] + sums[3])
    return total


def changes_by_numpy(base: Floats, delta: Floats) -> list[Floats]:
    x, d = base.astype(np.float64), delta.astype(np.float64)
    return [summed(terms) for terms in (d, np.abs(d), d * d, x * d)]


def squares_by_numpy(values: Floats) -> list[Floats]:
    wide = values.astype(np.float64)
    return [summed(wide * wide)]


def absorbed_by_numpy(x: Floats, y: Floats, a: Floats, b: Floats) -> list[Floats]:
    d = y.astype(np.float64) - x.astype(np.float64)
    magnitude = a.dtype.type(np.iinfo(a.dtype).max >> 1)
    equal = (a == b) | ((a & magnitude == 0) & (b & magnitude == 0))
    return [summed(d * d), summed(np.where(equal, d * d, 0.0))]


def followed_by_numpy(codes: Floats) -> list[Floats]:
    """Of bfloat16 codes, even ones before odd ones; of float32 and float64 as they come."""
    if codes.dtype == np.uint16:
        left, right = (codes.astype(np.uint32) << 16).view(np.float32)
        delta = (right - left).reshape(-1, SUMS, 2).swapaxes(1, 2)
    else:
        left, right = codes.view(f"f{codes.itemsize}").astype(np.float64)
        delta = (right - left).reshape(-1, 2, SUMS)
    sums = np.zeros(SUMS, delta.dtype)
    products = np.zeros((2, PRODUCT_SUMS))
    for row in delta.reshape(-1, SUMS):
        sums += row * row
    for row in delta.astype(np.float64).reshape(-1, PRODUCT_SUMS):
        products[0] += row * row
        products[1] += (row * row) * (row * row)
    return [sums, products]


def values(n: int, real: Any, rng: np.random.Generator) -> Floats:
    """Of many sizes, so that each order of additions rounds otherwise."""
    return (rng.standard_normal(n) * 10.0 ** rng.integers(-3, 3, n)).astype(real)


def calls() -> Iterator[tuple[Callable[..., Any], Callable[..., list[Floats]], tuple[Any, ...]]]:
    """What is compiled, what NumPy does in its place, and their arguments."""
    rng = np.random.default_rng(0)
    for n in SIZES:
        for real in FLOATS:
            yield changes, changes_by_numpy, (values(n, real, rng), values(n, real, rng))
            yield squares, squares_by_numpy, (values(n, real, rng),)
        for real, code in ABSORBED:
            codes = rng.choice(np.array([0, 1, 2, np.iinfo(code).max // 2 + 1], code), (2, n))
            yield absorbed, absorbed_by_numpy, (values(n, real, rng), values(n, real, rng), *codes)


def codes_followed(code: Any) -> Floats:
    """A base and a step."""
    rng = np.random.default_rng(1)
    wide = values(2 * 9 * LANES, np.float64 if code is np.uint64 else np.float32, rng).reshape(2, -1)
    return (wide.view(np.uint32) >> 16).astype(code) if code is np.uint16 else wide.view(code)


def follow(codes: Floats) -> list[Floats]:
    sums = np.zeros((1, SUMS), np.float32 if codes.dtype == np.uint16 else np.float64)
    products = np.zeros((2, PRODUCT_SUMS))
    followed(codes, sums, products, np.zeros((1, LANES)))
    return [sums[0], products]


def digits(found: Any) -> str:
    return " ".join(np.asarray(one).tobytes().hex() for one in found)


def test_sums_have_the_digits_of_their_order() -> None:
    for compute, by_numpy, given in calls():
        place = compute.__name__, given[0].size, *(part.dtype for part in given)
        assert digits(compute(*given)) == digits(by_numpy(*given)), place


@pytest.mark.parametrize("code", FOLLOWED)
def test_nothing_is_multiplied_and_added_at_once_that_would_round_otherwise(code: Any) -> None:
    codes = codes_followed(code)
    assert digits(follow(codes)) == digits(followed_by_numpy(codes))


EVERY = """
import sys
from ckptdiff.kernel_compiler import set_target
set_target(sys.argv[1])
from test_ordered_sums import FOLLOWED, calls, codes_followed, digits, follow
for compute, _, given in calls():
    print(digits(compute(*given)))
for code in FOLLOWED:
    print(digits(follow(codes_followed(code))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("level", [*LEVELS, "baseline"])
def test_every_level_has_them(level: str) -> None:
    if not has_level(level):
        pytest.skip(f"this processor has no {level}")
    done = subprocess.run(
        [sys.executable, "-c", EVERY, level],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = [digits(by_numpy(*given)) for _, by_numpy, given in calls()]
    expected += [digits(followed_by_numpy(codes_followed(code))) for code in FOLLOWED]
    assert done.stdout.splitlines() == expected


def test_a_scan_adds_tile_by_tile() -> None:
    """Of a block, in its own dtype and cast to bfloat16."""
    rng = np.random.default_rng(2)
    base = values(3 * TILE + 1003, np.float32, rng)
    tuned = np.where(rng.random(base.size) < 0.4, base + values(base.size, np.float32, rng) / 64, base)
    for compare in ("f32", "bf16"):
        expected = np.zeros(len(Sum))
        for start in range(0, base.size, TILE):
            expected += sums_of_tile(base[start : start + TILE], tuned[start : start + TILE], compare)
        partial = Partial()
        scan = Scan(FORMATS["f32"], FORMATS["f32"], FORMATS[compare])
        CpuBackend().scan(scan, InMemory(base.view(np.uint8), tuned.view(np.uint8), base.size), partial)
        assert digits(partial.sums) == digits([expected])


def sums_of_tile(base: Floats, tuned: Floats, compare: str) -> Floats:
    """In the order of ``Sum``."""
    if compare == "f32":
        changed = base != tuned
        found = changes_by_numpy(base[changed], tuned[changed] - base[changed])
        return np.array([*found, *squares_by_numpy(base), 0, 0, 0])
    codes = [rounded(side) for side in (base, tuned)]
    x, y = ((side.astype(np.uint32) << 16).view(np.float32) for side in codes)
    found = changes_by_numpy(x[x != y], (y - x)[x != y])
    return np.array([*found, 0, *absorbed_by_numpy(base, tuned, *codes), 0])


def rounded(values: Floats) -> Floats:
    """Bfloat16 codes of float32 values, to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
