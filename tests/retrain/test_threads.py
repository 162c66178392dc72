"""The units of a table are shared among threads: each is done once, whatever number there is of either."""

from __future__ import annotations

from collections.abc import Iterator

import numba
import numpy as np
import pytest
import torch

from ckptdiff.retrain.kernels.shared_work import next_unit, table_of
from ckptdiff.retrain.step_threads import run_kernel

ROWS = table_of("first")


@numba.njit(nogil=True)
def count_units(rows: np.ndarray, seen: np.ndarray, counter: np.ndarray) -> None:
    row, unit = next_unit(rows, 0, counter)
    while row < rows.size:
        seen[rows[row].first + unit] += 1
        row, unit = next_unit(rows, row, counter)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("units", [[], [1], [3], [1, 1, 1], [2, 0, 5, 0, 1], [100_000, 1], [1] * 5000])
def test_each_unit_is_done_once(units: list[int], threads: int) -> None:
    ends = np.cumsum(units, dtype=np.int64)
    rows = np.array([(end - count, end) for count, end in zip(units, ends, strict=True)], ROWS)
    seen = np.zeros(sum(units), np.int64)
    run_kernel(count_units, rows, seen)
    assert (seen == 1).all()


def test_what_a_kernel_raises_comes_out(threads: int) -> None:
    def kernel(*_: object) -> None:
        raise ValueError("of the kernel")

    with pytest.raises(ValueError, match="of the kernel"):
        run_kernel(kernel, np.array([(0, 9)], ROWS))
