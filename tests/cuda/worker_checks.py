"""A worker's answers beside those of the reference, on any device."""

import numpy as np
from code_samples import assert_partials_equal, random_codes, tuned_codes

from ckptdiff.measure.partial import Partial, Refined, Scan, Targets
from ckptdiff.measure.reference import ReferenceBackend
from ckptdiff.measure.source import InMemory


def sides(base_format, tuned_format, n, seed=0, kind="tame"):
    """Codes of both sides."""
    rng = np.random.default_rng(seed)
    base = random_codes(base_format, n, rng, kind)
    return base, tuned_codes(base, base_format, tuned_format, n, rng, kind)


def source(base, tuned):
    """A span in memory."""
    return InMemory(base.view(np.uint8), tuned.view(np.uint8), base.size)


def check(worker, scan, base, tuned, first_tie=0):
    """Compare one scan."""
    got, expected = Partial(), Partial()
    mask = worker.scan(scan, source(base, tuned), got, first_tie)
    right = ReferenceBackend().scan(scan, source(base, tuned), expected, first_tie)
    assert_partials_equal(got, expected)
    assert (mask is None) == (right is None)
    if mask is not None:
        np.testing.assert_array_equal(mask, right)


def check_refine(worker, format, base, tuned):
    """Compare one further pass, on the fullest bins."""
    scan, seen = Scan(format, format, format), Partial()
    ReferenceBackend().scan(scan, source(base, tuned), seen)
    weights = tuple(np.argsort(seen.weights[1])[-4:].tolist()) if format.bits > 16 else ()
    deltas = tuple(np.argsort(seen.deltas[0].view(np.int64))[-4:].tolist())
    shift, tails = (48, (1e-5, 1e-4)) if format.bits == 64 else (16, ())
    targets = Targets(shift, deltas, weights, (1e-4, 1e-6, 1e-5), tails)
    got, expected = Refined.empty(targets), Refined.empty(targets)
    worker.refine(scan, targets, source(base, tuned), got)
    ReferenceBackend().refine(scan, targets, source(base, tuned), expected)
    for name in ("deltas", "weights", "within"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    assert got.tails.shape == expected.tails.shape
    np.testing.assert_allclose(got.tails, expected.tails, rtol=1e-12)
    assert expected.deltas.sum() > 0
