from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spectrum_cases import s1_like, singular_values

from ckptdiff.linalg.kernels.nonzeros import gather_nonzeros
from ckptdiff.linalg.krylov import KrylovOptions, krylov_values
from ckptdiff.linalg.nonzeros import Nonzeros
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


def test_what_is_gathered() -> None:
    matrix = np.array([[0, 2, 0], [0, 0, 0], [-1, np.nan, 3], [-0.0, 0, 5]], np.float32)
    columns, values, ends = np.empty(6, np.int32), np.empty(6, np.float32), np.empty(4, np.int64)
    gather_nonzeros(matrix, columns, values, ends)
    assert columns[:5].tolist() == [1, 0, 1, 2, 2]
    assert np.array_equal(values[:5], np.array([2, -1, np.nan, 3, 5], np.float32), equal_nan=True)
    assert ends.tolist() == [1, 1, 4, 5]


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
