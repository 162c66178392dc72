"""Both modes and adapters on arrays that are not NumPy's, held against NumPy's figures; nothing leaves them unasked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from array_libraries import library_called, panels_of, refuse_silent_transfers

from ckptdiff.linalg.library import library_of
from ckptdiff.linalg.on_numpy import NUMPY
from ckptdiff.linalg.stages import ArrayPanels, run_together
from ckptdiff.linalg.survey import survey
from ckptdiff.lora.factors import factorize
from ckptdiff.options import SpectraOptions
from ckptdiff.spectra.matrices import MatrixView
from ckptdiff.spectra.measure import MatrixSpectra, measure_exact, measure_randomized

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
        assert np.abs(found.values[name] - values).max() <= error * max(values.max(), 1.0), name


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


def test_the_library_of_an_array_is_asked_of_the_array() -> None:
    strict = library_called("strict")
    found = library_of(strict.zeros((2, 3), np.float32))
    assert (found.xp, found.device) == (strict.xp, strict.device)  # type: ignore[attr-defined]
    assert library_of(np.zeros(3)) is NUMPY
