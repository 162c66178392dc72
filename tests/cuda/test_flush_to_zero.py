"""The self-test on a device that computes wrong figures in the way that a GPU would: nobody accepts it."""

import platform

import pytest
from host_gpu import HostGpu

from ckptdiff.measure.cuda.backend import CudaBackend
from ckptdiff.measure.cuda.slots import Room
from ckptdiff.measure.self_test import SELF_TESTED, self_test

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("names", SELF_TESTED, ids="-".join)
def test_the_kernels_pass(libraries, names):
    assert self_test(CudaBackend(HostGpu(libraries, processors=1), Room.smallest()), names) is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86 is told here to flush to zero")
@pytest.mark.parametrize("names", [names for names in SELF_TESTED if "f64" not in names], ids="-".join)
def test_a_device_that_flushes_to_zero_fails(libraries, names):
    worker = CudaBackend(HostGpu(libraries, processors=1), Room.smallest())
    with libraries(*names).flushing():
        wrong = self_test(worker, names)
    assert wrong is not None and "deltas" in wrong
