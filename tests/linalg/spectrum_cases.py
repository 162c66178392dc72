"""Matrices with known kinds of spectra, and what full float64 decompositions say of them."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def orthonormal(rng: np.random.Generator, rows: int, columns: int) -> Floats:
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def with_values(rng: np.random.Generator, rows: int, values: Floats) -> Floats:
    return (orthonormal(rng, rows, values.size) * values) @ orthonormal(rng, values.size, values.size).T


def to_bf16(values: Floats) -> NDArray[np.float32]:
    """Round to nearest even, as float32."""
    codes = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((codes + 0x7FFF + (codes >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


def s1_like(rng: np.random.Generator, rows: int, columns: int) -> Floats:
    """An update as S1 describes them: numerically full rank, a third of the energy in a few directions."""
    bulk = rng.standard_normal((rows, columns))
    few = min(32, columns)
    lead = (orthonormal(rng, rows, few) * np.arange(1, few + 1) ** -0.5) @ orthonormal(rng, columns, few).T
    return 1e-4 * (bulk + lead * math.sqrt(0.5) * np.linalg.norm(bulk) / np.linalg.norm(lead))


def update(kind: str, rows: int, columns: int, seed: int) -> Floats:
    """An update of `rows` x `columns`, tall."""
    rng = np.random.default_rng(seed)
    places = np.arange(columns)
    if kind == "flat":
        return 1e-4 * rng.standard_normal((rows, columns))
    if kind == "s1":
        return s1_like(rng, rows, columns)
    values = {
        "power": (places + 1.0) ** -0.7,
        "exponential": np.exp(-places / 20),
        "low rank": np.where(places < 8, 2.0 - places / 8, 0.0),
        "deficient": np.where(places < columns - columns // 8, 1.0 / (1 + places / 50), 0.0),
    }[kind]
    return 1e-3 * with_values(rng, rows, values)


def base(rows: int, columns: int, seed: int) -> NDArray[np.float32]:
    """Weights on the bfloat16 grid, with a spectrum that falls a little."""
    rng = np.random.default_rng(seed)
    return to_bf16(0.02 * rng.standard_normal((rows, columns)) * np.exp(-np.arange(columns) / columns))


def singular_values(matrix: Floats) -> Floats:
    """Kept, since each library is held against them."""
    return _singular_values(matrix.tobytes(), matrix.dtype.str, matrix.shape)


@cache
def _singular_values(values: bytes, dtype: str, shape: tuple[int, int]) -> Floats:
    matrix = np.frombuffer(values, dtype).reshape(shape)
    return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)


def principal_figures(weights: Floats, delta: Floats, rho: float) -> dict[str, float]:
    """Energies and coverages from a full decomposition and a full sort."""
    weights, delta = np.asarray(weights, np.float64), np.asarray(delta, np.float64)
    left, values, right = np.linalg.svd(weights, full_matrices=False)
    k = max(1, math.floor(rho * min(weights.shape) + 1e-9))
    left, right = left[:, :k], right[:k].T
    total = np.sum(delta**2)
    count = math.ceil(rho * weights.size - 1e-9)
    scores = np.abs((left * values[:k]) @ right.T).ravel()
    top = np.zeros(weights.size, bool)
    top[np.argsort(-scores, kind="stable")[:count]] = True
    magnitudes = np.abs(weights).ravel()
    cut = np.sort(magnitudes)[count - 1]
    tied = (count - np.sum(magnitudes < cut)) / np.sum(magnitudes == cut)
    not_low = np.where(magnitudes < cut, 0.0, np.where(magnitudes == cut, 1.0 - tied, 1.0))
    changed, above = (delta != 0).ravel(), (np.abs(delta) > 1e-5).ravel()
    return {
        "energy": np.sum((left.T @ delta @ right) ** 2) / total,
        "energy_long": np.sum((left.T @ delta) ** 2) / total,
        "energy_short": np.sum((delta @ right) ** 2) / total,
        "coverage": np.sum(changed & top) / np.sum(changed),
        "coverage_above": np.sum(above & top) / np.sum(above),
        "not_low": np.sum((changed & top) * not_low) / np.sum(changed),
        "not_low_above": np.sum((above & top) * not_low) / np.sum(above),
        "low_above": np.sum(above * (1.0 - not_low)) / np.sum(above),
    }
