from __future__ import annotations

import ctypes
import threading
import time
from typing import Any

import numpy as np
import pytest
import scipy.linalg

from ckptdiff.linalg.blas import (
    _with_work,
    add_gram_block,
    add_product_block,
    eigh_all,
    eigh_part,
    solve_lower_block,
)

DTYPES = (np.float32, np.float64)


def noise(rows: int, columns: int, dtype: Any, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(dtype)


def symmetric(n: int, dtype: Any) -> np.ndarray:
    matrix = noise(n, n, dtype)
    return matrix + matrix.T


def close(found: np.ndarray, known: np.ndarray) -> bool:
    return np.allclose(found, known, rtol=0, atol=40 * float(np.finfo(found.dtype).eps) * np.abs(known).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 1, 1), (1, 9, 4), (6, 1, 2), (4, 8, 1)], ids=str)
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_products_of_rows_and_of_columns(dtype: Any, shape: tuple[int, int, int], turned: tuple[bool, bool]) -> None:
    rows, inner, columns = shape
    # Parts of larger arrays, so that their lines lie apart.
    left = noise(inner, rows + 3, dtype)[:, 1 : rows + 1].T if turned[0] else noise(rows, inner + 2, dtype)[:, 2:]
    right = (
        noise(columns, inner + 3, dtype, 1)[:, 1 : inner + 1].T if turned[1] else noise(inner, columns + 2, dtype, 1)
    )
    right = right[:, :columns]
    held = noise(rows, columns + 5, dtype, 2)
    out = held.copy()
    add_product_block(out[:, 1 : columns + 1], left, right)
    assert close(out[:, 1 : columns + 1], held[:, 1 : columns + 1] + left @ right)
    out[:, 1 : columns + 1] = np.nan
    add_product_block(out[:, 1 : columns + 1], left, right, keep=False)
    assert close(out[:, 1 : columns + 1], left @ right)
    assert np.array_equal(out[:, columns + 1 :], held[:, columns + 1 :])


def test_a_column_of_which_numpy_says_anything() -> None:
    column = noise(1, 12, np.float64)[:, ::1].T  # (12, 1), as of a row read transposed
    total = np.zeros((1, 1))
    add_gram_block(total, column)
    assert total[0, 0] == pytest.approx(np.sum(column**2))


def test_every_other_column_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        add_product_block(np.zeros((4, 4)), noise(4, 8, np.float64)[::2, ::2][:2], noise(4, 4, np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_matrix_in_the_lower_triangle(dtype: Any) -> None:
    panel, total = noise(20, 6, dtype), noise(6, 6, dtype, 1)
    found = total.copy()
    add_gram_block(found, panel)
    assert close(np.tril(found), np.tril(total + panel.T @ panel))
    assert np.array_equal(np.triu(found, 1), np.triu(total, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_lower_triangular_system(dtype: Any) -> None:
    factor = np.tril(noise(6, 6, dtype)) + 4 * np.eye(6, dtype=dtype)
    right = noise(6, 9, dtype, 1)
    found = right.copy()
    solve_lower_block(factor, found)
    assert close(found, scipy.linalg.solve_triangular(factor, right, lower=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "first", "last"), [(40, 30, 39), (40, 0, 3), (40, 0, 39), (1, 0, 0)])
def test_some_eigenpairs(dtype: Any, n: int, first: int, last: int) -> None:
    matrix = symmetric(n, dtype)
    known = scipy.linalg.eigvalsh(matrix.astype(np.float64))[first : last + 1]
    error = 40 * float(np.finfo(dtype).eps) * n
    values, vectors = eigh_part(np.tril(matrix), first, last)
    assert np.allclose(values, known, rtol=0, atol=error)
    assert np.allclose(matrix @ vectors.T, vectors.T * values, rtol=0, atol=error)
    assert np.allclose(vectors @ vectors.T, np.eye(len(values)), rtol=0, atol=error)
    alone, none = eigh_part(np.tril(matrix), first, last, vectors=False)
    assert np.allclose(alone, known, rtol=0, atol=error)
    assert none.size == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 40])
def test_all_eigenpairs(dtype: Any, n: int) -> None:
    matrix = symmetric(n, dtype)
    error = 40 * float(np.finfo(dtype).eps) * n
    values, vectors = eigh_all(np.tril(matrix))
    assert np.allclose(values, scipy.linalg.eigvalsh(matrix.astype(np.float64)), rtol=0, atol=error)
    assert np.allclose(matrix @ vectors.T, vectors.T * values, rtol=0, atol=error)


def test_a_routine_that_fails_is_an_error() -> None:
    info = ctypes.c_int(0)

    def fail(*work: Any) -> None:
        info.value = 3

    with pytest.raises(np.linalg.LinAlgError, match="info 3"):
        _with_work(fail, np.float64, info)


def test_other_threads_run_meanwhile() -> None:
    """Were the lock of the interpreter held meanwhile, another thread would have a turn before and one after it."""
    matrix, most = symmetric(600, np.float64), 0
    for _ in range(100):  # on a busy machine most are over before another thread has had many
        inside, begun = threading.Event(), threading.Event()

        def decompose(inside: threading.Event = inside, begun: threading.Event = begun) -> None:
            inside.set()
            begun.set()
            eigh_all(matrix)
            inside.clear()

        thread = threading.Thread(target=decompose)
        thread.start()
        begun.wait()
        turns = 0
        while inside.is_set():
            time.sleep(0)
            turns += 1
        thread.join()
        most = max(most, turns)
        if most > 20:
            break
    assert most > 20
