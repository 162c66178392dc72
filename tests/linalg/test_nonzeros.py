from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spectrum_cases import s1_like, singular_values

from ckptdiff.linalg.krylov import KrylovOptions, krylov_values
from ckptdiff.linalg.nonzeros import Listed, Nonzeros
from ckptdiff.linalg.stages import ArrayPanels, run_together


def sparse(rows: int, width: int, share: float, dtype: Any, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, width)) * (rng.random((rows, width)) < share)).astype(dtype)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    width=st.integers(1, 70),
    count=st.integers(1, 50),
    share=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 99),
)
def test_products_are_numpys(rows: list[int], width: int, count: int, share: float, dtype: Any, seed: int) -> None:
    panels = [sparse(size, width, share, dtype, seed + place) for place, size in enumerate(rows)]
    block = np.random.default_rng(seed).standard_normal((width, 2 * count)).astype(dtype)[:, ::2]
    held = block.copy()
    found = Nonzeros(*panels).squared_product(block)
    wide = np.concatenate(panels).astype(np.float64)
    assert found.dtype == dtype and found.shape == (width, count)
    error = 20 * float(np.finfo(dtype).eps)
    assert np.all(abs(found - wide.T @ (wide @ block)) <= error * (abs(wide).T @ (abs(wide) @ abs(block))))
    assert np.array_equal(block, held)


def test_what_is_listed() -> None:
    matrix = np.array([[0, 2, 0], [0, 0, 0], [-1, np.nan, 3], [-0.0, 0, 5]], np.float32)
    known = {
        "rows": (Listed.of(matrix), [1, 0, 1, 2, 2], [2, -1, np.nan, 3, 5], [1, 1, 4, 5]),
        "columns": (Listed.transposed(matrix, 0, 3), [2, 0, 2, 2, 3], [-1, 2, np.nan, 3, 5], [1, 3, 5]),
        "two columns": (Listed.transposed(matrix, 1, 3), [0, 2, 2, 3], [2, np.nan, 3, 5], [2, 4]),
    }
    for found, places, values, ends in known.values():
        listed = found.trimmed()
        assert listed.places.tolist() == places
        assert np.array_equal(listed.values, np.array(values, np.float32), equal_nan=True)
        assert listed.ends.tolist() == ends


@pytest.mark.parametrize("shape", [(1 << 16, 2), (2, 1 << 16), (3, 5000)], ids=str)
def test_long_rows_and_columns_are_listed(shape: tuple[int, int]) -> None:
    matrix = sparse(*shape, 0.01, np.float32, 3)
    matrix[-1, -1] = 1.0
    for listed, known in ((Listed.of(matrix), matrix), (Listed.transposed(matrix, 0, shape[1]), matrix.T)):
        found = np.zeros_like(known)
        rows = np.repeat(np.arange(len(known)), np.diff(listed.ends, prepend=0))
        places, values = listed.trimmed().places, listed.trimmed().values
        found[rows, places] = values
        assert np.array_equal(found, known)
        assert np.all(np.diff(rows * float(1 << 16) + places) > 0)


@pytest.mark.parametrize("shape", [(1500, 700), (700, 700)], ids=str)
def test_leading_values_of_a_sparse_update(shape: tuple[int, int]) -> None:
    """They are those of a full decomposition, between bounds that hold, and those of d^T d up to rounding."""
    rng = np.random.default_rng(0)
    update = (s1_like(rng, *shape) * (rng.random(shape) < 0.1)).astype(np.float32)
    known = singular_values(update)[:64] ** 2
    source = ArrayPanels(np.ones_like(update), update, 400)
    found, dense = (
        run_together(source, krylov_values(shape[1], [16, 64], np.float32, KrylovOptions(sparse=kept)))[0]
        for kept in (True, False)
    )
    assert np.all(found.lower <= known * (1 + 1e-5)) and np.allclose(found.lower, known, rtol=0.03)
    for k in (16, 64):
        assert known[:k].sum() <= found.upper[k]
    assert np.allclose(found.lower, dense.lower, rtol=1e-5) and found.steps == dense.steps
    assert np.allclose(list(found.upper.values()), list(dense.upper.values()), rtol=1e-5)
