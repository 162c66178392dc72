"""The self-test passes what is right and names what is wrong."""

import numpy as np
import pytest

from ckptdiff.formats import FORMATS
from ckptdiff.measure import self_test as module
from ckptdiff.measure.cpu import CpuBackend
from ckptdiff.measure.decoding_self_test import coded_sources
from ckptdiff.measure.self_test import SELF_TESTED, self_test, wrong_figures
from ckptdiff.measure.source import blocks_of_span


@pytest.mark.parametrize("names", SELF_TESTED, ids="-".join)
def test_the_cpu_backend_passes(names):
    assert self_test(CpuBackend(), names) is None


@pytest.mark.parametrize(
    ("field", "spoil"),
    [
        ("counts", lambda counts: counts.__setitem__(0, 7)),
        ("sums", lambda sums: sums.__imul__(1 + 1e-9)),
        ("max_abs", lambda max_abs: max_abs.__imul__(2)),
    ],
)
def test_what_differs_is_named(field, spoil):
    class Wrong(CpuBackend):
        def scan(self, scan, source, partial, first_tie=0):
            mask = super().scan(scan, source, partial, first_tie)
            spoil(getattr(partial, field))
            return mask

    assert self_test(Wrong()) == f"{field} of bf16-bf16-bf16"


def test_a_wrong_mask_is_named():
    class Wrong(CpuBackend):
        def scan(self, scan, source, partial, first_tie=0):
            return super().scan(scan, source, partial, first_tie) ^ 1

    assert self_test(Wrong()) == "mask of bf16-bf16-bf16"


def codes(name):
    """Codes of both sides, as NumPy integers."""
    format = FORMATS[name]
    (sides,) = blocks_of_span(module._codes(format, format), (format.bits, format.bits))
    return [side.view(format.code_dtype) for side in sides]


@pytest.mark.parametrize("name", ["bf16", "f16", "f8_e4m3", "f8_e5m2"])
def test_every_code_is_tried_on_either_side(name):
    for side in codes(name):
        assert np.unique(side).size == 1 << FORMATS[name].bits


@pytest.mark.parametrize("name", ["f8_e4m3", "f8_e5m2"])
def test_every_code_of_8_bits_meets_every_other(name):
    base, tuned = codes(name)
    assert np.unique(base.astype(np.uint16) << 8 | tuned).size == 1 << 16


@pytest.mark.parametrize(("name", "real"), [("bf16", np.float32), ("f32", np.float32), ("f64", np.float64)])
def test_numbers_and_differences_are_subnormal_too(name, real):
    sides = [side.astype(np.uint32) << 16 if name == "bf16" else side for side in codes(name)]
    base, tuned = (side.view(real) for side in sides)
    with np.errstate(invalid="ignore", over="ignore"):
        delta = tuned - base
    for values in (base, tuned, delta, delta[(np.abs(base) >= np.finfo(real).tiny)]):
        assert np.count_nonzero((values != 0) & (np.abs(values) < np.finfo(real).tiny)) > 10
    assert np.isinf(base).any() or np.isnan(base).any()


def test_codes_with_scales_are_of_every_kind():
    for scan, source in coded_sources().values():
        base, tuned = source.right
        values = np.concatenate(
            [side.view(np.float32) for side in ([base, tuned] if scan.base.bits == 32 else [tuned])]
        )
        sizes = np.abs(values[np.isfinite(values)])
        assert np.isnan(values).any() and np.isinf(values).any() and (sizes == 0).any()
        assert np.count_nonzero((sizes > 0) & (sizes < np.finfo(np.float32).tiny)) > 1000
        equal, changed, within = source.right_kept
        assert (equal > 0) == (scan.base.bits == 32) and 100 < within < changed < source.numel


def test_the_whole_of_it_names_all_that_is_wrong():
    class Wrong(CpuBackend):
        def scan(self, scan, source, partial, first_tie=0):
            mask = super().scan(scan, source, partial, first_tie)
            partial.counts[0] += scan.base.bits == 8
            return mask

    assert wrong_figures(CpuBackend()) == ""
    e4m3, e5m2 = (f"counts of {'-'.join([name] * 3)}" for name in ("f8_e4m3", "f8_e5m2"))
    assert wrong_figures(Wrong()) == f"{e4m3}; {e5m2}"
