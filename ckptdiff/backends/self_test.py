"""Does this machine compute what it should? A backend's answer to a small pair, beside that of the reference."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from ckptdiff.backends.backend import Backend
from ckptdiff.backends.formats import FORMATS, Format
from ckptdiff.backends.partial import Partial, Rule, Scan
from ckptdiff.backends.reference import ReferenceWorker
from ckptdiff.backends.source import InMemory

__all__ = ["SELF_TESTED", "self_test"]

SELF_TESTED = (("bf16", "bf16", "bf16"), ("f32", "bf16", "bf16"), ("f32", "f32", "f32"))
"""Base, tuned and compare format of what ``ckptdiff doctor`` tries."""
_NUMEL = 70_001
"""More than a tile of every backend, and no multiple of anything."""


def self_test(backend: Backend, names: tuple[str, str, str] = SELF_TESTED[0]) -> str | None:
    """Measure a small pair; returns what differs from the reference, None if nothing does."""
    base, tuned, compare = (FORMATS[name] for name in names)
    source = _sample(base, tuned)
    scan = Scan(base, tuned, compare, (0.0, 1e-5), 1e-3, Rule.ABOVE, 1e-3, want_mask=True)
    got, expected = Partial(), Partial()
    ours, theirs = backend.scan(scan, source, got), ReferenceWorker().scan(scan, source, expected)
    wrong = [] if ours is not None and theirs is not None and np.array_equal(ours, theirs) else ["mask"]
    for field in fields(Partial):
        found, right = getattr(got, field.name), getattr(expected, field.name)
        if field.name == "sums":
            same = np.allclose(found, right, rtol=1e-12, atol=1e-12 * np.abs(right).max())
        else:
            same = field.name == "span" or np.array_equal(found, right)
        wrong += [] if same else [field.name]
    return f"{', '.join(wrong)} of {'-'.join(names)}" if wrong else None


def _sample(base: Format, tuned: Format) -> InMemory:
    """Gaussian weights of which a third moved."""
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal(_NUMEL) * 0.02).astype(np.float32)
    moved = weights + np.where(rng.random(_NUMEL) < 0.3, 0.003, 0).astype(np.float32)
    sides = [
        (values.view(np.uint32) >> 16).astype(np.uint16) if format.bits == 16 else values.view(np.uint32)
        for values, format in ((weights, base), (moved, tuned))
    ]
    return InMemory(sides[0].view(np.uint8), sides[1].view(np.uint8), _NUMEL)
