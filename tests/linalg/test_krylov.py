from __future__ import annotations

import numpy as np
import pytest
from array_libraries import Made
from spectrum_cases import singular_values, update

from ckptdiff.linalg.krylov import KrylovOptions, LeadingValues, direct_values, krylov_values
from ckptdiff.linalg.stages import ArrayPanels, run_together

RANKS = (1, 2, 4, 8, 16, 32, 64)
KINDS = ("flat", "s1", "power", "exponential", "low rank", "deficient")


def leading(
    delta: np.ndarray, options: KrylovOptions | None = None, rows: int = 300, made: Made = ArrayPanels
) -> LeadingValues:
    delta = np.ascontiguousarray(delta, np.float32)
    source, options = made(delta, delta, rows), options or KrylovOptions()
    stage = krylov_values(delta.shape[1], RANKS, source.dtype, options, source.library)
    (found,) = run_together(source, stage)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1800, 720), (720, 720), (4000, 400)], ids=str)
def test_values_are_those_of_a_full_decomposition(kind: str, shape: tuple[int, int], on_library: Made) -> None:
    """Found in passes, and of a Gram matrix."""
    delta = update(kind, *shape, seed=3)
    known = singular_values(delta.astype(np.float32))
    total = np.sum(known**2)
    expected = np.cumsum(known**2) / total
    near = pytest.approx(known[63], rel=0.02 if kind == "flat" else 0.01, abs=1e-6 * known[0])
    for gram in (0, 4096):
        found = leading(delta, KrylovOptions(gram=gram), made=on_library)
        shares = np.cumsum(found.lower) / total
        assert abs(shares[15] - expected[15]) <= min(0.005, 0.02 * expected[15])
        assert found.lower[0] == pytest.approx(known[0] ** 2, rel=0.005)  # the stable rank
        assert np.sqrt(found.lower[63]) == near
        for k in RANKS:
            assert found.upper[k] >= np.sum(known[:k] ** 2)


@pytest.mark.slow
def test_bound_holds_and_is_small_on_updates_like_the_papers(on_library: Made) -> None:
    small, held = [], 0
    for seed in range(12):
        delta = update("s1", 1100, 660, seed)
        found = leading(delta, KrylovOptions(seed=seed), made=on_library)
        energies = np.cumsum(singular_values(delta.astype(np.float32)) ** 2)
        held += all(found.upper[k] >= energies[k - 1] for k in RANKS)
        small.append((found.upper[16] - found.lower[:16].sum()) / energies[-1])
    assert held == 12
    assert np.median(small) < 0.01


@pytest.mark.parametrize("scale", [2.0**-43, 2.0**-30, 2.0**30], ids=str)
def test_values_and_bound_scale_with_the_update(scale: float, on_library: Made) -> None:
    delta = update("flat", 720, 700, seed=0)
    found, scaled = leading(delta, made=on_library), leading(scale * delta, made=on_library)
    assert scaled.steps == found.steps
    assert np.allclose(scaled.lower / scale**2, found.lower, rtol=1e-6)
    assert [scaled.upper[k] / scale**2 for k in RANKS] == pytest.approx([found.upper[k] for k in RANKS], rel=1e-6)


@pytest.mark.parametrize("gram", [0, 4096], ids=["in passes", "of a Gram matrix"])
@pytest.mark.parametrize("value", [0.49408308, 0.82407445])
def test_bound_holds_for_a_constant_update(value: float, gram: int, on_library: Made) -> None:
    delta = np.full((1400, 650), value, np.float32)
    energy = delta.size * float(delta[0, 0]) ** 2
    found = leading(delta, KrylovOptions(gram=gram), rows=1400, made=on_library)
    assert energy <= found.upper[1] <= (1 + 1e-4) * energy


def test_stops_early_where_the_space_is_exhausted(on_library: Made) -> None:
    found = leading(update("low rank", 900, 700, seed=1), made=on_library)
    assert found.steps <= 3
    assert found.lower[:8].sum() == pytest.approx(found.lower.sum(), rel=1e-5)


def test_seed_and_panels(on_library: Made) -> None:
    delta = update("s1", 1000, 650, seed=0)
    once, again = (leading(delta, made=on_library) for _ in range(2))
    assert np.array_equal(once.lower, again.lower)
    assert np.allclose(once.lower, leading(delta, rows=77, made=on_library).lower, rtol=1e-5)
    other = leading(delta, KrylovOptions(seed=5), made=on_library)
    assert np.allclose(once.lower[:16], other.lower[:16], rtol=1e-5)
    home = on_library(once.vectors, once.vectors).library.home
    assert not np.array_equal(home(once.vectors), home(other.vectors))


def test_vectors_give_the_values(on_library: Made) -> None:
    delta = update("power", 900, 700, seed=2)
    found = leading(delta, made=on_library)
    vectors = on_library(found.vectors, found.vectors).library.home(found.vectors)
    assert np.allclose(np.linalg.norm(delta @ vectors, axis=0) ** 2, found.lower, rtol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (9, 1), (5, 4), (300, 70), (64, 64)], ids=str)
@pytest.mark.parametrize("with_vectors", [False, True])
def test_small_matrices_are_decomposed_outright(shape: tuple[int, int], with_vectors: bool, on_library: Made) -> None:
    delta = update("flat", *shape, seed=1)
    source = on_library(delta, delta, 50)
    (found,) = run_together(source, direct_values(shape[1], RANKS, with_vectors=with_vectors, library=source.library))
    known = singular_values(delta)[:64]
    assert np.allclose(np.sqrt(found.lower), known, rtol=1e-9, atol=1e-9 * known[0])
    assert all(found.upper[k] >= np.sum(known[:k] ** 2) for k in found.upper)
