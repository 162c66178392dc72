"""The same tables on a real GPU through CuPy (``pytest -m gpu``); skipped, with the reason, where there is none.

With CKPTDIFF_NEED_GPU=1 in the environment there has to be one: what would be skipped fails.
"""

from pathlib import Path

import numpy as np
import pytest
from host_kernels import TESTED
from run_files import assert_same_run, datasets
from worker_checks import check, check_refine, sides

import ckptdiff
from ckptdiff.errors import DeviceError
from ckptdiff.formats import FORMATS
from ckptdiff.measure.cuda.backend import CudaBackend
from ckptdiff.measure.cuda.choice import find_gpu
from ckptdiff.measure.cuda.slots import Room
from ckptdiff.measure.partial import BLOCK, Rule, Scan
from ckptdiff.measure.self_test import SELF_TESTED, self_test

pytestmark = pytest.mark.gpu
FIXTURES = Path(__file__).parents[2] / "fixtures"
SIZES = (1, 7, 9, 4097, 32_768, 32_769, 300_001)
LARGE = (BLOCK + 77, (9 << 20) + 5)
"""Several blocks, several launches: the reference takes seconds, so not for every format."""
RULES = [(Rule.NONE, 0.0), (Rule.BITWISE, 0.0), (Rule.ABOVE, 1e-5), (Rule.ETA, 4e-3)]


@pytest.fixture(scope="module")
def gpu():
    try:
        return find_gpu(0)
    except DeviceError as error:
        pytest.skip(error.problem)


@pytest.fixture(scope="module", params=[Room(), Room.smallest()], ids=["roomy", "tight"])
def worker(gpu, request):
    return CudaBackend(gpu, request.param)


@pytest.mark.parametrize("kind", ["wild", "tame"])
@pytest.mark.parametrize("names", TESTED, ids="-".join)
def test_scan_equals_reference(worker, names, kind):
    formats = [FORMATS[name] for name in names]
    for i, n in enumerate(SIZES):
        rule, cut = RULES[i % 4]
        scan = Scan(*formats, (0.0, 1e-8, 1e-5, 1e-4), 1e-3, rule, cut, want_mask=True)
        check(worker, scan, *sides(*formats[:2], n, i, kind))


@pytest.mark.parametrize("n", LARGE)
@pytest.mark.parametrize("names", [TESTED[0], TESTED[6]], ids="-".join)
def test_scan_of_a_large_tensor(worker, names, n):
    formats = [FORMATS[name] for name in names]
    scan = Scan(*formats, (0.0, 1e-8, 1e-5, 1e-4), 1e-3, Rule.ABOVE, 1e-5, want_mask=True)
    check(worker, scan, *sides(*formats[:2], n))


@pytest.mark.parametrize("names", TESTED[:6], ids="-".join)
def test_refine_equals_reference(worker, names):
    check_refine(worker, FORMATS[names[2]], *sides(FORMATS[names[0]], FORMATS[names[1]], BLOCK + 1234))


def test_top_takes_its_share_of_ties(worker):
    f32 = FORMATS["f32"]
    rng = np.random.default_rng(0)
    n = (3 << 20) + 7
    tuned = rng.choice(np.array([0, 0, 1, 2], np.float32), n)
    ties = int(np.count_nonzero(tuned == 1))
    for take in (0, ties // 3, ties):
        scan = Scan(f32, f32, f32, (1e-5,), 1e-3, Rule.TOP, 1.0, ties, take, want_mask=True)
        check(worker, scan, np.zeros(n, np.uint32), tuned.view(np.uint32))


@pytest.mark.parametrize("names", SELF_TESTED, ids="-".join)
def test_self_test(worker, names):
    assert self_test(worker, names) is None


@pytest.mark.parametrize("fixture", ["llama", "moe", "fp8", "wide", "odd", "tied", "vlm"])
def test_runs_are_those_of_the_cpu(gpu, tmp_path, fixture):
    for device in ("cpu", "cuda"):
        sides = FIXTURES / fixture / "base", FIXTURES / fixture / "tuned"
        ckptdiff.diff(*sides, out=tmp_path / f"{device}.h5", device=device, mask="top:10")
    assert_same_run(datasets(tmp_path / "cuda.h5"), datasets(tmp_path / "cpu.h5"))
