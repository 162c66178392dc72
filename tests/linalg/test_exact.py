from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from array_libraries import Made, library_called, panels_of
from spectrum_cases import base, singular_values, update

from ckptdiff.linalg.angles import Comparable, angle_rank, compared_rank, principal_angles
from ckptdiff.linalg.exact import effective_rank, hard_threshold, nss, numerical_rank, side_spectrum
from ckptdiff.linalg.stages import run_together
from ckptdiff.linalg.symmetric import first_of_each

KINDS = ("flat", "s1", "power", "exponential", "low rank", "deficient")
SHAPES = [(500, 260), (260, 260), (3000, 30), (7, 1), (3, 2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_singular_value(kind: str, shape: tuple[int, int], on_library: Made) -> None:
    weights, delta = base(*shape, seed=1).astype(np.float64), update(kind, *shape, seed=2)
    source = on_library(weights, delta, 111)
    stages = [side_spectrum(side, shape[1], library=source.library) for side in ("base", "delta", "tuned")]
    for found, matrix in zip(run_together(source, *stages), (weights, delta, weights + delta), strict=True):
        known = singular_values(matrix)
        assert np.abs(found.values - known).max() <= 1e-11 * known[0]
        for tau in (1e-6, 1e-5, 1e-4):
            fewest, most = numerical_rank(found.values, tau)
            assert fewest == most == np.sum(known > tau * known[0])
        shares = known[known > 0] / known.sum()
        assert effective_rank(found.values) == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-8)


def test_a_rank_that_rounding_cannot_decide_is_an_interval() -> None:
    assert numerical_rank(np.array([1.0, 1e-5 * (1 + 1e-9), 0.0]), 1e-5) == (1, 2)
    assert numerical_rank(np.array([1.0, 1.1e-5, 0.9e-5]), 1e-5) == (2, 2)


def test_nss(on_library: Made) -> None:
    weights, delta = base(300, 90, seed=1).astype(np.float64), update("s1", 300, 90, seed=2)
    source = on_library(weights, delta)
    ours, theirs = run_together(source, *(side_spectrum(side, 90, 0, source.library) for side in ("base", "tuned")))
    known = singular_values(weights), singular_values(weights + delta)
    assert nss(ours.values, theirs.values) == pytest.approx(
        np.linalg.norm(known[1] - known[0]) / np.linalg.norm(known[0]), rel=1e-8
    )
    assert np.isnan(nss(np.zeros(3), np.ones(3)))


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("shape", [(400, 150), (120, 120)], ids=str)
def test_angles(shape: tuple[int, int], scale: float, on_library: Made) -> None:
    weights, delta = base(*shape, seed=4).astype(np.float64), scale * update("s1", *shape, seed=5)
    source, k = on_library(weights, delta, 70), angle_rank(shape[1])
    sides = (side_spectrum(side, shape[1], k, source.library) for side in ("base", "tuned"))
    ours, theirs = run_together(source, *sides)
    assert ours.eigenpairs is not None
    assert theirs.eigenpairs is not None
    (found,) = run_together(source, principal_angles(ours.eigenpairs[1], theirs.eigenpairs[1], source.library))
    first, second = (np.linalg.svd(matrix, full_matrices=False) for matrix in (weights, weights + delta))
    # SciPy lists the largest first, and takes small angles from sines as well.
    long = scipy.linalg.subspace_angles(first[0][:, :k], second[0][:, :k])[::-1]
    short = scipy.linalg.subspace_angles(first[2][:k].T, second[2][:k].T)[::-1]
    assert np.allclose(found.long, long, rtol=1e-6, atol=1e-7 * long.max())
    assert np.allclose(found.short, short, rtol=1e-6, atol=1e-7 * short.max())


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("shape", [(400, 150), (120, 120), (30, 1)], ids=str)
def test_rotations_of_leading_parts(shape: tuple[int, int], scale: float, on_library: Made) -> None:
    """Whatever is compared beside them: angles of fewer vectors, or of none."""
    weights, delta = base(*shape, seed=4).astype(np.float64), scale * update("s1", *shape, seed=5)
    source, count = on_library(weights, delta, 70), max(shape[1] // 2, 1)
    sides = (side_spectrum(side, shape[1], count, source.library) for side in ("base", "tuned"))
    vectors = [found.eigenpairs[1] for found in run_together(source, *sides)]
    ranks = sorted({max(1, int(rho * shape[1])) for rho in (0.01, 0.1, 0.2)})
    few = shape[1] // 3
    (found,) = run_together(source, principal_angles(*vectors, source.library, ranks=ranks, angles=few))
    first, second = (np.linalg.svd(matrix, full_matrices=False) for matrix in (weights, weights + delta))
    for k in ranks:
        long = np.sin(scipy.linalg.subspace_angles(first[0][:, :k], second[0][:, :k])).mean()
        short = np.sin(scipy.linalg.subspace_angles(first[2][:k].T, second[2][:k].T)).mean()
        assert found.rotations[k] == pytest.approx((long, short), rel=1e-6, abs=1e-13)
    assert found.long.size == found.short.size == few
    if few:
        assert np.allclose(found.long, scipy.linalg.subspace_angles(first[0][:, :few], second[0][:, :few])[::-1])
        assert np.allclose(found.short, scipy.linalg.subspace_angles(first[2][:few].T, second[2][:few].T)[::-1])


def subspace_angles(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The smallest first; SciPy's own, which not every version finds of no vectors."""
    return scipy.linalg.subspace_angles(left, right)[::-1] if left.shape[1] else np.empty(0)


@pytest.mark.parametrize("few", [0, 12, 40])
@pytest.mark.parametrize("library", ["strict", "torch"])
def test_angles_of_a_stack_are_those_of_each_pair(few: int, library: str) -> None:
    """Two small updates and a large one, of which less is defined, in a stack with room for another pair."""
    weights, delta = np.zeros((2, 4, 130, 60))
    for k, scale in enumerate((1.0, 1e-6, 100.0)):
        weights[k], delta[k] = base(130, 60, seed=k), scale * update("s1", 130, 60, seed=9 + k)
    source, most, all_ranks = panels_of(library_called(library))(weights, delta, 130), 40, (3, 7, 40)
    compared = [Comparable(few, all_ranks), Comparable(few, all_ranks[:2]), Comparable(0, all_ranks[:2])]
    sides = [np.linalg.svd(matrices, full_matrices=False) for matrices in (weights, weights + delta)]
    counts, double = np.array([one.count for one in compared]), np.dtype(np.float64)
    ours, theirs = (
        first_of_each(source.library.put(np.ascontiguousarray(side[2][:, :most].mT)), counts, double, source.library)
        for side in sides
    )
    stage = principal_angles(ours[0], theirs[0], source.library, ranks=all_ranks, angles=few, missing=ours[1])
    (found,) = run_together(source, stage)
    for member, defined in enumerate(compared):
        one = defined.chosen(found, member)
        assert one is not None and set(one.rotations) == set(defined.ranks)
        long, short = (
            {k: subspace_angles(left[:, :k], right[:, :k]) for k in (*defined.ranks, defined.angles)}
            for left, right in ([side[0][member] for side in sides], [side[2][member].T for side in sides])
        )
        for k, rotations in one.rotations.items():
            known = np.sin(long[k]).mean(), np.sin(short[k]).mean()
            assert rotations == pytest.approx(known, rel=1e-6, abs=1e-13)
        for angles, known_angles in ((one.long, long), (one.short, short)):
            assert angles == pytest.approx(known_angles[defined.angles], rel=1e-6, abs=1e-12)
    assert Comparable(0, ()).chosen(found, 3) is None


def test_how_many_vectors_are_compared() -> None:
    assert [angle_rank(short) for short in (1, 2, 700, 2000)] == [0, 1, 350, 512]
    assert [compared_rank(short) for short in (1, 2, 700, 2000, 4096)] == [1, 1, 350, 512, 819]


def test_the_threshold_of_noise_is_that_of_the_papers_table() -> None:
    """Donoho and Gavish 2014, Table IV, whose cubic is good to 0.02; noise alone has nothing above it."""
    rng = np.random.default_rng(0)
    for shape, coefficient in (((2000, 100), 1.5194), ((400, 200), 2.1711), ((300, 300), 2.8582)):
        values = np.linalg.svd(rng.standard_normal(shape), compute_uv=False)
        assert hard_threshold(values, shape[0]) == pytest.approx(coefficient * np.median(values), rel=0.02)
        assert values[0] < hard_threshold(values, shape[0])
    assert np.isnan(hard_threshold(np.array([1.0, 1e-13, 0.0]), 3))
