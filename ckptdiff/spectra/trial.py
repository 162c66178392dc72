"""Try a GPU: figures of a matrix and of smaller ones in a stack, in both modes, beside those of the processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.formats import FORMATS
from ckptdiff.linalg.stages import ArrayPanels, PanelSource, run_together
from ckptdiff.linalg.survey import survey, survey_of_each
from ckptdiff.measure.source import ByteArray
from ckptdiff.options import SpectraMode, SpectraOptions
from ckptdiff.spectra.gpu_panels import GpuPanels, GpuStack, PanelSlots
from ckptdiff.spectra.matrices import MatrixView
from ckptdiff.spectra.measure import MatrixSpectra, measure_exact, measure_randomized, measure_stack

_ROWS = 520
"""More than a problem has that stays on the host."""
_SMALL_ROWS = 64
_NEAR = {"randomized": 1e-3, "exact": 1e-7}
"""How far figures may be apart; those that count entries lie on both sides of a cut in float32."""


@dataclass
class _InMemory:
    """Codes of bfloat16 in memory."""

    codes: tuple[NDArray[np.uint16], NDArray[np.uint16]]
    dtype: np.dtype[Any]
    view: MatrixView
    formats = (FORMATS["bf16"],) * 3
    work, same_bytes = 0.0, False

    def __post_init__(self) -> None:
        self.long, self.short = self.view.long, self.view.short

    def read_codes(self, side: int, rows: tuple[int, int], columns: tuple[int, int], out: ByteArray) -> None:
        """Copy a block."""
        out[:] = np.ascontiguousarray(self.codes[side][slice(*rows), slice(*columns)]).view(np.uint8).reshape(-1)

    def sample(self, count: int) -> NDArray[Any]:
        """About `count` rows of W0."""
        return self.sides()[0][:: max(1, self.long // count)]

    def sides(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """W0 and d as the processor makes them."""
        base, tuned = ((side.astype(np.uint32) << 16).view(np.float32).T.astype(self.dtype) for side in self.codes)
        return np.ascontiguousarray(base), np.ascontiguousarray(tuned - base)


def wrong_spectra(slots: PanelSlots, rows: int = _ROWS) -> str:
    """What a GPU computes otherwise than the processor, by mode; "" if nothing.

    Of a matrix of so many rows, and of two small ones in a stack that has room for a third.
    """
    return "; ".join(found for mode in ("randomized", "exact") if (found := _wrong(slots, mode, rows)))


def _wrong(slots: PanelSlots, mode: SpectraMode, rows: int) -> str:
    dtype = np.dtype(np.float64 if mode == "exact" else np.float32)
    alone, *small = (_pair(size, dtype, seed) for seed, size in enumerate((rows, _SMALL_ROWS, _SMALL_ROWS)))
    found = [_measured(GpuPanels(alone, slots, kept=mode == "exact"), mode, alone.view), *_stacked(small, slots, mode)]
    wrong = [
        key
        for pair, one in zip((alone, *small), found, strict=True)
        for key, value in _measured(ArrayPanels(*pair.sides()), mode, pair.view).figures.items()
        if not np.isclose(one.figures.get(key, np.nan), value, _NEAR[mode], _NEAR[mode], equal_nan=True)
    ]
    return f"{', '.join(dict.fromkeys(wrong))} of {mode} spectra" if wrong else ""


def _pair(rows: int, dtype: np.dtype[Any], seed: int) -> _InMemory:
    view, rng = MatrixView(0, rows, rows + 150), np.random.default_rng(seed)  # wide, so that it is turned
    base = rng.standard_normal((rows, view.columns)) * np.linspace(1, 3, rows)[:, None]
    tuned = base + 0.01 * rng.standard_normal(base.shape)
    codes = [(side.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for side in (base, tuned)]
    return _InMemory((codes[0], codes[1]), dtype, view)


def _measured(source: PanelSource, mode: SpectraMode, view: MatrixView) -> MatrixSpectra:
    (known,) = run_together(source, survey(source.library))
    if mode == "exact":
        return measure_exact(source, known, view, 0.0, True)
    return measure_randomized(source, known, view, 0.0, SpectraOptions(block=8, steps=16))


def _stacked(pairs: Sequence[_InMemory], slots: PanelSlots, mode: SpectraMode) -> list[MatrixSpectra]:
    source = GpuStack(pairs, slots, len(pairs) + 1)
    (known,) = run_together(source, survey_of_each(source.library, source.stack, len(pairs)))
    found = measure_stack(source, known, pairs[0].view, [0.0] * len(pairs), mode)
    return [one for one in found if one is not None]
