from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptdiff.linalg.blas import eigh_of_tridiagonal, to_tridiagonal
from ckptdiff.linalg.kernels.tridiagonal import count_below, vectors_near
from ckptdiff.linalg.on_numpy import NUMPY
from ckptdiff.linalg.separate_pairs import eigh_separate, pairs_of_tridiagonal

EPS = float(np.finfo(np.float32).eps)


def with_values(values: Any, seed: int = 0) -> np.ndarray:
    """A float32 matrix with eigenvalues near these."""
    values = np.asarray(values, np.float64)
    turned = np.linalg.qr(np.random.default_rng(seed).standard_normal((values.size, values.size)))[0]
    matrix = (turned * values) @ turned.T
    return ((matrix + matrix.T) / 2).astype(np.float32)


def check(matrix: np.ndarray, first: int, last: int) -> None:
    """Values, residuals and orthogonality are those that float32 has; only the lower triangle is read."""
    wide = matrix.astype(np.float64)
    known = scipy.linalg.eigvalsh(wide)
    scale = max(np.abs(known).max(), 1e-300)
    lower = np.tril(matrix) + np.triu(np.full_like(matrix, np.nan), 1)
    values, vectors = eigh_separate(lower, first, last)
    assert values.dtype == vectors.dtype == np.float32
    assert vectors.shape == (len(matrix), last - first + 1)
    error = 8 * EPS * len(matrix) ** 0.5
    v = vectors.astype(np.float64)
    assert np.abs(values - known[first : last + 1]).max() <= error * scale
    assert np.linalg.norm(wide @ v - v * values, axis=0).max() <= error * scale
    assert np.abs(v.T @ v - np.eye(len(values))).max() <= error


SPECTRA = {
    "spread": np.linspace(0, 1, 150),
    "falling": np.exp(-np.arange(150) / 9.0),
    "one large": np.append(np.linspace(1, 1.001, 149), 1e4),
    "equal": np.ones(150),
    "two equal groups": np.repeat([1.0, 3.0], 75),
    "low rank": np.append(np.zeros(140), np.arange(10) + 1.0),
    "pairs that all but coincide": np.repeat(np.linspace(0, 1, 75), 2) + 1e-7 * np.tile([0, 1], 75),
    "both signs": np.linspace(-1, 1, 150),
}


@pytest.mark.parametrize("places", [(110, 149), (0, 20), (149, 149), (0, 149)], ids=str)
@pytest.mark.parametrize("kind", SPECTRA)
def test_pairs_are_those_of_the_matrix(kind: str, places: tuple[int, int]) -> None:
    check(with_values(SPECTRA[kind]), *places)


@pytest.mark.parametrize("n", [1, 2, 3, 31, 33, 128, 129, 130, 257])
def test_sizes_around_those_of_blocks(n: int) -> None:
    noise = np.random.default_rng(n).standard_normal((n, n)).astype(np.float32)
    check(noise + noise.T, max(0, n - n // 5 - 1), n - 1)


@pytest.mark.parametrize(
    "matrix", [np.zeros((40, 40)), np.eye(40), np.diag(np.arange(40.0)), np.ones((40, 40))], ids=str
)
def test_matrices_that_fall_apart(matrix: np.ndarray) -> None:
    check(matrix.astype(np.float32), 30, 39)


def test_values_that_agree_to_all_digits() -> None:
    """Wilkinson's: the largest two differ by 1e-13, and their vectors have no more in common than their place."""
    check((np.diag(np.abs(np.arange(-10.0, 11))) + np.eye(21, k=1) + np.eye(21, k=-1)).astype(np.float32), 17, 20)


@pytest.mark.parametrize("apart", [1e-9, 1e-11, 1e-13, 1e-14, 1e-15, 0.0])
def test_vectors_of_near_values_are_made_orthogonal_or_left_to_lapack(apart: float) -> None:
    rng = np.random.default_rng(0)
    half, beside = rng.standard_normal(30), rng.standard_normal(29)
    diagonal, joined = np.append(half, half + apart), np.concatenate([[0.0], beside, [apart / 2], beside, [0.0]])
    found = pairs_of_tridiagonal(diagonal, joined, 40, 59)
    assert found is not None or apart < 1e-10
    if found is not None:
        wide = found[1].astype(np.float64)
        assert np.allclose(wide.T @ wide, np.eye(20), rtol=0, atol=8 * EPS)
        whole = np.diag(diagonal) + np.diag(joined[1:-1], 1) + np.diag(joined[1:-1], -1)
        assert np.allclose(whole @ wide, wide * found[0], rtol=0, atol=20 * EPS)


@pytest.mark.parametrize("exponent", [-80, -40, 40, 80])
def test_every_scale(exponent: int) -> None:
    check(np.ldexp(with_values(SPECTRA["falling"]), exponent), 120, 149)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, 1.0, 1.0 + 1e-6, 1.0 + 1e-4, 2.0, -1.0, 1e-9, 1e3]), min_size=1, max_size=50),
    seed=st.integers(0, 99),
    few=st.integers(1, 50),
)
def test_clusters_of_any_kind(values: list[float], seed: int, few: int) -> None:
    check(with_values(values, seed), max(0, len(values) - few), len(values) - 1)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 60), seed=st.integers(0, 99), split=st.floats(0, 1))
def test_counts_below_and_vectors_near(n: int, seed: int, split: float) -> None:
    """Of tridiagonal matrices, some of which fall apart."""
    rng = np.random.default_rng(seed)
    diagonal, beside = rng.standard_normal(n), np.zeros(n + 1)
    beside[1:n] = rng.standard_normal(n - 1) * (rng.random(n - 1) >= split * 0.3)
    whole = np.diag(diagonal) + np.diag(beside[1:n], 1) + np.diag(beside[1:n], -1)
    known = np.linalg.eigvalsh(whole)
    shifts = rng.uniform(-3, 3, 70)
    counts = np.empty(70)
    count_below(diagonal, beside[:-1] ** 2, 1e-290, shifts, counts)
    assert np.array_equal(counts, (known < shifts[:, None]).sum(axis=1))
    vectors, residuals = np.empty((n, n), np.float32), np.empty(n)
    vectors_near(diagonal, beside, 1e-30, known, vectors, residuals)
    wide = vectors.astype(np.float64)
    assert np.allclose(np.linalg.norm(wide, axis=0), 1, rtol=0, atol=1e-5)
    assert np.allclose(np.linalg.norm(whole @ wide - wide * known, axis=0), residuals, rtol=0, atol=1e-5)
    assert residuals.max() < 1e-10


def test_what_is_not_a_number_is_refused() -> None:
    matrix = np.eye(20, dtype=np.float32)
    matrix[5, 3] = np.nan
    with pytest.raises(np.linalg.LinAlgError):
        eigh_separate(matrix, 15, 19)


@pytest.mark.parametrize("n", [1, 2, 50])
def test_lapack_on_the_same_tridiagonal_matrix(n: int) -> None:
    """What is fallen back on where vectors are not independent."""
    noise = np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)
    diagonal, beside, sizes, _ = to_tridiagonal(noise + noise.T)
    assert beside[0] == beside[-1] == 0 and len(sizes) == n - 1
    known = scipy.linalg.eigh(np.diag(diagonal) + np.diag(beside[1:-1], 1) + np.diag(beside[1:-1], -1))
    values, vectors = eigh_of_tridiagonal(diagonal, beside[1:-1], n // 2, n - 1)
    assert np.allclose(values, known[0][n // 2 :], rtol=0, atol=1e-12)
    assert np.allclose(np.abs(vectors), np.abs(known[1][:, n // 2 :]), rtol=0, atol=1e-6)


def test_who_takes_them() -> None:
    """NumPy's library, of float32, where they are few."""
    matrix = with_values(np.linspace(1, 2, 60))
    values, vectors = NUMPY.eigenpairs(matrix.copy(), 50, 59)
    again = eigh_separate(matrix.copy(), 50, 59)
    assert np.array_equal(values, again[0]) and np.array_equal(vectors, again[1])
