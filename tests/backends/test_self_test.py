"""The self-test passes what is right and names what is wrong."""

import pytest

from ckptdiff.backends.cpu import CpuWorker
from ckptdiff.backends.self_test import SELF_TESTED, self_test


@pytest.mark.parametrize("names", SELF_TESTED, ids="-".join)
def test_the_cpu_backend_passes(names):
    assert self_test(CpuWorker(), names) is None


@pytest.mark.parametrize(
    ("field", "spoil"),
    [
        ("counts", lambda counts: counts.__setitem__(0, 7)),
        ("sums", lambda sums: sums.__imul__(1 + 1e-9)),
        ("max_abs", lambda max_abs: max_abs.__imul__(2)),
    ],
)
def test_what_differs_is_named(field, spoil):
    class Wrong(CpuWorker):
        def scan(self, scan, source, partial, first_tie=0):
            mask = super().scan(scan, source, partial, first_tie)
            spoil(getattr(partial, field))
            return mask

    assert self_test(Wrong()) == f"{field} of bf16-bf16-bf16"


def test_a_wrong_mask_is_named():
    class Wrong(CpuWorker):
        def scan(self, scan, source, partial, first_tie=0):
            return super().scan(scan, source, partial, first_tie) ^ 1

    assert self_test(Wrong()) == "mask of bf16-bf16-bf16"
