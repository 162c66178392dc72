from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from array_libraries import Made
from spectrum_cases import base, orthonormal, principal_figures, to_bf16, update

from ckptdiff.formats import FORMATS
from ckptdiff.linalg.principal import Principal, principal
from ckptdiff.linalg.score_cut import ScoreCut, ScoreCuts
from ckptdiff.linalg.stages import ArrayPanels, run_together
from ckptdiff.linalg.survey import survey
from ckptdiff.measure.rounding_null import change_chances
from ckptdiff.measure.thresholds import principal_rank

RHO = (0.01, 0.05, 0.1, 0.2)
FIGURES = ("energy", "energy_long", "energy_short", "coverage", "coverage_above", "not_low", "not_low_above")


def sparse_update(weights: np.ndarray, scale: float, seed: int) -> np.ndarray:
    """A small step rounded to the grid: most entries do not move."""
    step = update("s1", *weights.shape, seed=seed)
    return to_bf16(weights + scale * step / np.abs(step).mean()) - weights


def measure(
    weights: np.ndarray, delta: np.ndarray, dtype: Any = np.float32, rows: int = 300, made: Made = ArrayPanels
) -> list[Principal]:
    source = made(np.ascontiguousarray(weights, dtype), np.ascontiguousarray(delta, dtype), rows)
    (known,) = run_together(source, survey(source.library))
    chances = change_chances(known.weights, known.changed)
    error = 4e-6 if dtype == np.float32 else 1e-7
    ((_, found),) = run_together(source, principal(source, known, RHO, chances, error=error))
    return found


@pytest.mark.parametrize("shape", [(1500, 500), (400, 400), (3000, 40), (50, 7)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_figures_are_those_of_a_full_decomposition(shape: tuple[int, int], dtype: Any, on_library: Made) -> None:
    weights = base(*shape, seed=1)
    delta = sparse_update(weights, 2e-5, seed=2)
    assert 0 < np.mean(delta != 0) < 0.6
    for figure in measure(weights, delta, dtype, made=on_library):
        known = principal_figures(weights, delta, figure.rho)
        for name in FIGURES[:3]:
            assert getattr(figure, name) == pytest.approx(known[name], rel=1e-5 if dtype == np.float32 else 1e-8)
        for name in FIGURES[3:]:
            assert getattr(figure, name) == pytest.approx(known[name], abs=1e-5 if dtype == np.float32 else 1e-6)


def test_null_is_what_rounded_noise_does(on_library: Made) -> None:
    weights = base(1200, 400, seed=3)
    noise = np.random.default_rng(4).standard_normal(weights.shape)
    delta = to_bf16(weights + 3e-5 * noise) - weights
    for figure in measure(weights, delta, made=on_library)[1:]:
        assert figure.coverage == pytest.approx(figure.null, rel=0.03)
        assert figure.null < figure.rho  # large weights have a coarser grid


def test_null_weighs_each_magnitude_by_its_chance_to_move(on_library: Made) -> None:
    weights = base(300, 120, seed=5)
    delta = sparse_update(weights, 2e-5, seed=6)
    figure = measure(weights, delta, np.float64, made=on_library)[2]
    left, values, right = np.linalg.svd(weights.astype(np.float64), full_matrices=False)
    k = principal_rank(0.1, 120)
    scores = np.abs((left[:, :k] * values[:k]) @ right[:k]).ravel()
    top = np.argsort(-scores)[: weights.size // 10]
    codes = (weights.view(np.uint32) >> 16 & 0x7FFF).ravel()
    counts = np.bincount(codes, minlength=1 << 15)
    chances = change_chances(counts, np.bincount(codes[(delta != 0).ravel()], minlength=1 << 15))
    assert chances is not None
    assert float(chances @ counts) == pytest.approx(np.count_nonzero(delta), rel=1e-9)
    assert figure.null == pytest.approx(chances[codes][top].sum() / chances[codes].sum(), abs=1e-6)


def test_an_update_inside_the_principal_subspaces_is_seen_as_such(on_library: Made) -> None:
    weights = base(300, 200, seed=7)
    left, _, right = np.linalg.svd(weights.astype(np.float64), full_matrices=False)
    inside = (left[:, :20] * np.linspace(2, 1, 20)) @ right[:20]
    assert measure(weights, inside, np.float64, made=on_library)[2].energy == pytest.approx(1.0, abs=1e-9)
    outside = left[:, 100:] @ right[100:]
    assert measure(weights, outside, np.float64, made=on_library)[2].energy == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (np.zeros((60, 40)), "the base is zero"),
        (orthonormal(np.random.default_rng(0), 60, 40), "no gap"),
        (np.outer(np.arange(1.0, 61), np.arange(1.0, 41)), "noise"),
    ],
    ids=["zero", "flat", "rank one"],
)
def test_no_figures_without_a_principal_subspace(weights: np.ndarray, reason: str, on_library: Made) -> None:
    found = measure(weights, np.ones((60, 40)), made=on_library)
    assert reason in found[-1].reason
    assert np.isnan(found[-1].energy)
    assert np.isnan(found[-1].coverage)


def test_one_column(on_library: Made) -> None:
    weights = base(50, 1, seed=1)
    figure = measure(weights, np.ones((50, 1)) * 1e-3, made=on_library)[2]
    assert figure.rank == 1
    assert figure.energy_short == pytest.approx(1.0)


@pytest.mark.parametrize("guess", [0.0, 1e-30, 1e30, float("nan"), 1.3])
def test_a_cut_is_found_from_any_guess(guess: float, on_library: Made) -> None:
    rng = np.random.default_rng(8)
    scores = rng.standard_normal((200, 90)).astype(np.float32)
    weights, delta = rng.standard_normal((2, 200, 90)).astype(np.float32)
    delta[rng.random(delta.shape) < 0.7] = 0
    source, scored = on_library(weights, delta, 64), on_library(scores, scores, 64)
    cut = ScoreCut(1800, guess, np.ones(1 << 15), (0, 1.0), 0.0)
    cuts = ScoreCuts([cut], source.library)
    while cuts.open:
        for panel, part in zip(source.panels(), scored.panels(), strict=True):
            cuts.add(part.base, panel)
        cuts.settle()
    assert cut.covered is not None
    top = np.argsort(-np.abs(scores).ravel())[:1800]
    assert cut.covered.entries == 1800
    assert cut.covered.changed == pytest.approx(np.count_nonzero(delta.ravel()[top]), abs=1e-9)
    assert cut.covered.above == pytest.approx(np.count_nonzero(np.abs(delta.ravel()[top]) > 1e-5), abs=1e-9)
    assert cut.covered.chance == pytest.approx(1800)


def test_ties_at_a_cut_count_fractionally(on_library: Made) -> None:
    scores = np.ones((10, 10), np.float32)
    delta = np.zeros((10, 10), np.float32)
    delta[:5] = 1
    cut = ScoreCut(20, 1.0, np.ones(1 << 15), (0, 1.0), 0.0)
    source, scored = on_library(delta, delta), on_library(scores, scores)
    cuts = ScoreCuts([cut], source.library)
    while cuts.open:
        cuts.add(next(scored.panels()).base, next(source.panels()))
        cuts.settle()
    assert cut.covered is not None
    assert cut.covered.changed == pytest.approx(10)


def test_survey_counts_and_sums(on_library: Made) -> None:
    weights = base(90, 30, seed=1)
    delta = sparse_update(weights, 2e-5, seed=2)
    source = on_library(weights, delta, 17)
    (known,) = run_together(source, survey(source.library))
    assert known.base_norm == pytest.approx(np.linalg.norm(weights.astype(np.float64)), rel=1e-12)
    assert known.delta_norm == pytest.approx(np.linalg.norm(delta.astype(np.float64)), rel=1e-12)
    assert known.support == np.count_nonzero(delta)
    assert known.above == np.count_nonzero(np.abs(delta) > 1e-5)
    for rho in RHO:
        assert known.low_coverage_above(rho) == pytest.approx(principal_figures(weights, delta, rho)["low_above"])
    (still,) = run_together(made := on_library(weights, np.zeros_like(delta), 17), survey(made.library))
    assert np.isnan(still.low_coverage_above(0.1))
    finite = slice(FORMATS["bf16"].infinite)
    total = np.sum(known.weights[finite] * FORMATS["bf16"].values()[finite])
    assert total == pytest.approx(np.abs(weights).sum(), rel=1e-5)
