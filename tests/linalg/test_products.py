from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from array_libraries import NAMES, library_called
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from spectrum_cases import base, update

from ckptdiff.linalg.krylov import KrylovOptions, krylov_values
from ckptdiff.linalg.nonzeros import add_sparse_product
from ckptdiff.linalg.on_numpy import NUMPY
from ckptdiff.linalg.principal import principal
from ckptdiff.linalg.stages import ArrayPanels, run_together
from ckptdiff.linalg.survey import survey
from ckptdiff.linalg.threads import cuts, in_parts, one_blas_thread, product_threads


@given(st.integers(1, 1 << 20), st.integers(256, 1024), st.integers(1, 16))
def test_cuts_leave_no_part_empty(size: int, least: int, most: int) -> None:
    at = cuts(size, least, most)
    assert at[0] == 0
    assert at[-1] == size
    assert all(first < stop for first, stop in pairwise(at))
    assert len(at) - 1 <= most


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("threads", [1, 3])
def test_products(dtype: Any, threads: int) -> None:
    rng = np.random.default_rng(0)
    left, right, panel = (rng.standard_normal(shape).astype(dtype) for shape in ((1200, 90), (90, 70), (60, 1500)))
    error = 1e-3 if dtype == np.float32 else 1e-11
    with product_threads(threads):
        found = NUMPY.product(left, right)
        assert np.allclose(found, left @ right, rtol=0, atol=error)
        NUMPY.add_product(found, left, right)
        assert np.allclose(found, 2 * left @ right, rtol=0, atol=error)
        total = np.zeros((1500, 1500), dtype)
        for _ in range(2):
            NUMPY.add_gram(total, panel)
    assert np.allclose(np.tril(total), np.tril(2 * panel.T @ panel), rtol=0, atol=error)


def mostly_zero(rows: int, columns: int, share: float, dtype: Any) -> Any:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((rows, columns)) * (rng.random((rows, columns)) < share)
    values[rows // 2] = 0  # a row, and a column, of which nothing is left
    values[:, columns // 3] = 0
    return values.astype(dtype)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.17, 0.5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("threads", [1, 3])
def test_products_that_skip_zeros(share: float, dtype: Any, threads: int) -> None:
    delta = mostly_zero(611, 1100, share, dtype)
    right, projected = (np.random.default_rng(2).standard_normal((n, 67)).astype(dtype) for n in (1100, 611))
    known = delta.astype(np.float64)
    error = 40 * float(np.finfo(dtype).eps)

    def close(found: Any, exact: Any) -> bool:
        return bool(np.abs(found - exact).max() <= error * max(np.abs(exact).max(), 1.0))

    with product_threads(threads):
        assert close(NUMPY.product(delta, right), known @ right)
        met, total = np.ones((1100, 67), dtype), np.ones((1100, 1100), dtype)
        NUMPY.add_product(met, delta.T, projected)
        assert close(met, 1 + known.T @ projected)
        NUMPY.add_gram(total, delta)
    assert close(np.tril(total), np.tril(1 + known.T @ known))


@given(
    arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 70)), elements=st.integers(-3, 3)),
    st.integers(1, 70),
    st.sampled_from([1, 3]),
)
def test_skipping_zeros_leaves_no_entry_out(left: Any, columns: int, threads: int) -> None:
    """Of whole numbers, whose sums are exact in any order."""
    rows, inner = left.shape
    right, above = (np.arange(1, n * columns + 1, dtype=np.float32).reshape(n, columns) for n in (inner, rows))
    found, turned = np.ones((rows, columns), np.float32), np.ones((inner, columns), np.float32)
    total = np.zeros((inner, inner), np.float32)
    with product_threads(threads):
        add_sparse_product(found, left, right)
        add_sparse_product(turned, left.T, above)
        add_sparse_product(total, left.T, left, triangle=True)
    assert np.array_equal(found, 1 + left @ right)
    assert np.array_equal(turned, 1 + left.T @ above)
    assert np.array_equal(total, np.tril(left.T @ left))


@pytest.mark.parametrize("share", [0.1, 1.0])
@pytest.mark.parametrize("narrow", [True, False], ids=["bf16", "f32"])
def test_no_digit_depends_on_the_number_of_threads(share: float, narrow: bool) -> None:
    weights, delta = (side.astype(np.float32) for side in (base(1333, 701, 1), update("s1", 1333, 701, 2)))
    if narrow:
        weights.view(np.uint32)[:] &= 0xFFFF_0000
    delta[np.random.default_rng(3).random(delta.shape) > share] = 0
    source = ArrayPanels(weights, delta, 1100)
    found = []
    for threads in (1, 2, 5):
        with one_blas_thread(), product_threads(threads):
            (known,) = run_together(source, survey())
            stages = (
                krylov_values(701, (16, 64), np.float32, KrylovOptions()),
                principal(source, known, (0.05, 0.2), np.full(1 << 15, 0.3), error=1e-6),
            )
            leading, (values, figures) = run_together(source, *stages)
            found.append((leading.lower.tobytes(), leading.upper, values.tobytes(), figures))
    assert found[0] == found[1] == found[2]


def test_parts_are_all_done_and_failures_come_through() -> None:
    done: list[int] = []
    with product_threads(4):
        in_parts(done.append, 9)
        assert sorted(done) == list(range(9))
        with pytest.raises(ZeroDivisionError):
            in_parts(lambda part: 1 // part, 3)


@pytest.mark.parametrize("name", NAMES)
def test_products_end_when_told_to(name: str) -> None:
    stop, library = threading.Event(), library_called(name)
    ones = library.put(np.ones((2, 2)))
    with product_threads(1, stop):
        library.product(ones, ones)
        stop.set()
        with pytest.raises(CancelledError):
            library.product(ones, ones)
    library.product(ones, ones)
