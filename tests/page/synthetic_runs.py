"""Synthetic figures that run files are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ckptdiff.figures.result import Diff, TensorFacts
from ckptdiff.figures.spectral import SPECTRAL_KEYS, Spectra
from ckptdiff.measure.histograms import LOG2_BINS, HistogramRows
from ckptdiff.measure.partial import ULP_BINS


def with_spectra(diff: Diff, seed: int = 0) -> Diff:
    """Spectral figures with all their digits, of every matrix."""
    rng = np.random.default_rng(seed)
    matrices = np.array(
        [int(len(facts.shape) == 2 and 0 not in facts.shape and facts.compare != "bitwise") for facts in diff.tensors]
    )
    columns = {key: np.where(matrices > 0, rng.uniform(0.01, 1, len(matrices)), np.nan) for key in SPECTRAL_KEYS}
    methods = tuple("exact" if one else "" for one in matrices)
    empty = Spectra.empty("exact", len(matrices))
    return replace(diff, spectra=replace(empty, columns=columns, methods=methods, matrices=matrices, ranks=matrices))


def histograms(tensors: Sequence[TensorFacts], seed: int = 0) -> HistogramRows:
    """Weights around 2^-6, of which a third changed; nothing of tensors of which only bits are compared."""
    rng = np.random.default_rng(seed)
    base, ulp = np.zeros((len(tensors), LOG2_BINS), np.uint64), np.zeros((len(tensors), ULP_BINS), np.uint64)
    valued = np.flatnonzero([facts.compare != "bitwise" for facts in tensors])[:, None]
    base[valued, np.arange(130, 150)] = rng.integers(1, 100_000, (len(valued), 20))
    ulp[valued, np.arange(6)] = rng.integers(1, 10_000, (len(valued), 6))
    return HistogramRows(np.roll(base, -8, axis=1), base, base // np.uint64(3), ulp)
