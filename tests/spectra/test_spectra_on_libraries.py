"""Both modes and adapters on arrays that are not NumPy's, held against NumPy's figures; nothing leaves them unasked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from array_libraries import library_called, panels_of, refuse_silent_transfers

from ckptdiff.linalg.library import library_of
from ckptdiff.linalg.on_numpy import NUMPY
from ckptdiff.linalg.stages import ArrayPanels, run_together
from ckptdiff.linalg.survey import survey, survey_of_each
from ckptdiff.lora.factors import factorize, factorize_each
from ckptdiff.options import SpectraOptions
from ckptdiff.spectra.matrices import MatrixView
from ckptdiff.spectra.measure import MatrixSpectra, measure_exact, measure_randomized, measure_stack

SMALL = SpectraOptions(block=8, steps=16)


def pair(long: int, short: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """A base with gaps in its spectrum, and an update of which half is zero."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((long, short)) * np.linspace(1, 3, short)
    delta = 1e-3 * rng.standard_normal((long, short)) * (rng.random((long, short)) < 0.5)
    return base.astype(dtype), delta.astype(dtype)


def measured(source: ArrayPanels, mode: str) -> MatrixSpectra:
    view = MatrixView(0, source.long, source.short)
    (known,) = run_together(source, survey(source.library))
    if mode == "exact":
        return measure_exact(source, known, view, 0.0, True)
    return measure_randomized(source, known, view, 0.0, SMALL)


def close(found: MatrixSpectra, known: MatrixSpectra, mode: str) -> None:
    error = 1e-9 if mode == "exact" else 2e-5
    assert found.method == known.method
    assert found.reasons == known.reasons
    assert found.figures.keys() == known.figures.keys()
    for key, value in known.figures.items():
        # A score in float32 may fall on the other side of its cut: two of the 31,500 changed entries, or more.
        counted = mode == "randomized" and ("coverage" in key or "not_low" in key)
        assert found.figures[key] == pytest.approx(value, rel=error, abs=1e-4 if counted else error, nan_ok=True), key
    for name, values in known.values.items():
        # Those that are noise beside the largest are square roots of rounding in randomized mode.
        power = 1 if mode == "exact" else 2
        apart = np.abs(found.values[name] ** power - values**power).max()
        assert apart <= error * max(values.max(), 1.0) ** power, name


@pytest.mark.parametrize("library", ["strict", "torch"])
@pytest.mark.parametrize(("mode", "short"), [("randomized", 90), ("randomized", 300), ("exact", 90), ("exact", 300)])
def test_figures_are_those_of_numpy(mode: str, short: int, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the error of each mode: rounding over the gaps of this base in float32, and in float64."""
    sides = pair(700, short, np.float64 if mode == "exact" else np.float32)
    known = measured(ArrayPanels(*sides, 200), mode)
    if library == "strict":
        refuse_silent_transfers(monkeypatch)
    found = measured(panels_of(library_called(library))(*sides, 200), mode)
    close(found, known, mode)


@pytest.mark.parametrize("library", ["strict", "torch"])
@pytest.mark.parametrize("short", [90, 700])
def test_factors_are_those_of_numpy(short: int, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, delta = pair(800, short, np.float32)
    norm = float(np.linalg.norm(delta))
    known = factorize(ArrayPanels(base, delta, 200), norm, 20, None, 0)
    if library == "strict":
        refuse_silent_transfers(monkeypatch)
    found = factorize(panels_of(library_called(library))(base, delta, 200), norm, 20, None, 0)
    assert found.rank == known.rank == 20
    assert found.lost == pytest.approx(known.lost, abs=1e-6)
    both = [factors.long_side @ factors.short_side.T for factors in (found, known)]
    assert np.linalg.norm(both[0] - both[1]) <= 1e-3 * norm


@pytest.mark.parametrize(("mode", "most"), [("randomized", 110), ("exact", 40)])
def test_few_and_small_transfers_however_many_panels(mode: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number for each matrix; but for histograms, which the standard lets nobody make, none for a panel."""
    long, short = 1400, 280
    sides = pair(long, short, np.float64 if mode == "exact" else np.float32)
    fetched = refuse_silent_transfers(monkeypatch)
    made = panels_of(library_called("strict"))
    numbers = []
    for rows in (700, 350):
        del fetched[:]
        measured(made(*sides, rows), mode)
        others = [size for size in fetched if size < 300 * short]
        assert max(others) <= short * short
        numbers.append(len(others))
    assert numbers[0] == numbers[1] <= most


KINDS = ("usual", "another", "low rank", "half rank", "no base", "left out", "small update")


def sides_of(kind: str, long: int, short: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Pairs with and without principal subspaces, and with singular values that have to be found again."""
    base, delta = pair(long, short, dtype)
    rng = np.random.default_rng(len(kind))
    if kind in ("low rank", "half rank"):
        rank = short // (15 if kind == "low rank" else 2)
        base = (base[:, :rank] @ rng.standard_normal((rank, short))).astype(dtype)
    elif kind == "another":
        base, delta = base[::-1] * (1 + 1e-3 * rng.standard_normal(base.shape)), delta @ rng.standard_normal((short, 3))
        delta = (delta @ rng.standard_normal((3, short)) / short).astype(dtype)
    elif kind in ("no base", "left out"):
        base = 0 * base
    return base.astype(dtype), delta * (0 if kind == "left out" else 1e-3 if kind == "small update" else 1)


def stacked(kinds: tuple[str, ...], library: str, mode: str, shape: tuple[int, int]) -> dict[str, MatrixSpectra | None]:
    """Pairs measured in a stack with room for eight."""
    dtype = np.float64 if mode == "exact" else np.float32
    base, delta = np.zeros((2, 8, *shape), dtype)
    for member, kind in enumerate(kinds):
        base[member], delta[member] = sides_of(kind, *shape, dtype)
    source = panels_of(library_called(library))(base, delta, shape[0])
    (known,) = run_together(source, survey_of_each(source.library, source.stack, len(kinds)))
    chosen = [None if kind == "left out" else one for kind, one in zip(kinds, known, strict=True)]
    found = measure_stack(source, chosen, MatrixView(0, *shape), [0.0] * len(kinds), mode)  # type: ignore[arg-type]
    return dict(zip(kinds, found, strict=True))


@pytest.mark.parametrize("library", ["strict", "torch"])
@pytest.mark.parametrize(("mode", "shape"), [("randomized", (300, 90)), ("exact", (300, 90)), ("exact", (64, 64))])
def test_a_pair_of_a_stack_is_measured_as_if_it_were_alone(
    mode: str, shape: tuple[int, int], library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near as NumPy's alone as another library is; and to the last digit the same whatever else is in the stack."""
    dtype = np.float64 if mode == "exact" else np.float32
    known = {
        kind: measured(ArrayPanels(*sides_of(kind, *shape, dtype), 200), mode) for kind in KINDS if kind != "left out"
    }
    if library == "strict":
        refuse_silent_transfers(monkeypatch)
    found = stacked(KINDS, library, mode, shape)
    assert found.pop("left out") is None
    for kind, one in found.items():
        assert one is not None
        close(one, known[kind], mode)
    if library == "strict":  # torch's own products do not repeat to the last digit
        for others in (KINDS[:1], KINDS[::-1], KINDS[2:5]):
            for kind, again in stacked(others, library, mode, shape).items():
                expected = found.get(kind)
                assert (again is None) == (expected is None)
                if again is not None and expected is not None:
                    assert again.figures == pytest.approx(expected.figures, rel=0, abs=0, nan_ok=True)
                    assert all(np.array_equal(again.values[name], values) for name, values in expected.values.items())


@pytest.mark.parametrize("kind", ["usual", "low rank"])
@pytest.mark.parametrize("mode", ["randomized", "exact"])
def test_transfers_of_a_stack_do_not_grow_with_its_pairs(mode: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor with pairs whose small singular values have to be found again."""
    fetched = refuse_silent_transfers(monkeypatch)
    numbers = []
    for count in (1, 2, 8):
        del fetched[:]
        stacked((kind,) * count, "strict", mode, (300, 90))
        numbers.append(len(fetched))
    assert numbers[0] == numbers[1] == numbers[2] <= 60


@pytest.mark.parametrize("library", ["strict", "torch"])
@pytest.mark.parametrize("energy", [None, 0.3])
def test_factors_of_a_stack_are_those_of_each_update(
    library: str, energy: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of updates of all ranks, of none, and beyond the range of squares in float32, in a stack with room for eight."""
    rng, (rows, short) = np.random.default_rng(3), (130, 40)
    delta = np.zeros((8, rows, short), np.float32)
    for member, (rank, scale) in enumerate([(40, 1e-3), (3, 1.0), (0, 1.0), (40, 1e-25), (1, 1e15)]):
        lead = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, short))
        delta[member] = scale * lead
    if library == "strict":
        refuse_silent_transfers(monkeypatch)
    source = panels_of(library_called(library))(np.zeros_like(delta), delta, 50)
    found = factorize_each(source, 5, 12, energy)
    assert [None if factors is None else factors.rank for factors in found[1:3]] == [3 if energy is None else 1, None]
    for factors, update in zip(found, delta.astype(np.float64), strict=False):
        left, values, right = np.linalg.svd(update, full_matrices=False)
        if factors is None:
            assert not values.any()
            continue
        shares = np.cumsum(values**2) / np.sum(values**2)
        if energy is not None:
            assert factors.rank == min(int(np.searchsorted(shares, energy)) + 1, 12)
        best = (left[:, : factors.rank] * values[: factors.rank]) @ right[: factors.rank]
        product = factors.long_side.astype(np.float64) @ factors.short_side.astype(np.float64).T
        np.testing.assert_allclose(product, best, rtol=0, atol=1e-5 * values[0])
        assert factors.norm == pytest.approx(np.linalg.norm(update), rel=1e-12)
        assert factors.lost == pytest.approx(1 - shares[factors.rank - 1], abs=1e-6)


def test_the_library_of_an_array_is_asked_of_the_array() -> None:
    strict = library_called("strict")
    found = library_of(strict.zeros((2, 3), np.float32))
    assert (found.xp, found.device) == (strict.xp, strict.device)  # type: ignore[attr-defined]
    assert library_of(np.zeros(3)) is NUMPY
