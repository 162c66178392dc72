"""Seeded trials of randomized mode, for `spectra.py`."""

from __future__ import annotations

import statistics

from harness import Section, Target
from spectra_settings import RANKS, Settings, leading
from spectrum_matrices import update

KINDS = ("flat", "s1", "power", "exponential", "low rank", "deficient")


def accuracy(settings: Settings) -> Section:
    """Seeded trials of each kind of spectrum against a full float64 decomposition."""
    import numpy as np

    rows, targets = [], []
    trials = held = 0
    for kind in KINDS:
        top, last, stable, bounds = [], [], [], []
        for seed in range(settings.trials):
            delta = update(kind, *settings.trial_shape, np.random.default_rng(seed))
            known = np.linalg.svd(delta.astype(np.float64), compute_uv=False) ** 2
            found, total = leading(delta, seed), known.sum()
            sums, true_sums = np.cumsum(found.lower), np.cumsum(known)
            top.append(abs(sums[15] - true_sums[15]) / total)
            stable.append(abs(known[0] / found.lower[0] - 1) if found.lower[0] else 1.0)
            floor = 1e-12 * known[0]
            last.append(abs(np.sqrt((found.lower[63] + floor) / (known[63] + floor)) - 1))
            bounds.append((found.upper[16] - sums[15]) / total)
            trials += 1
            held += all(found.upper[k] >= true_sums[k - 1] * (1 - 1e-12) for k in RANKS)
        row = {
            "updates": kind,
            "top-16 energy, points": 100 * max(top),
            "stable rank, %": 100 * max(stable),
            "s_64, %": 100 * max(last),
            "median bound, points": 100 * statistics.median(bounds),
        }
        rows.append(row)
        targets.append(Target(f"{kind}: top-16 energy, points", row["top-16 energy, points"], "<=", 0.5))
        targets.append(Target(f"{kind}: stable rank, %", row["stable rank, %"], "<=", 0.5))
        targets.append(Target(f"{kind}: s_64, %", row["s_64, %"], "<=", 2.0 if kind == "flat" else 1.0))
        if kind == "s1":
            targets.append(Target("s1: median bound, points", row["median bound, points"], "<=", 1.0))
    targets.append(Target("trials in which the bound held", held / trials, ">=", 0.99))
    shape = " x ".join(map(str, settings.trial_shape))
    return Section(f"worst of {settings.trials} seeded trials, {shape}, against float64 svd", rows, targets)
