"""Every piece of work runs once, whatever number there is of them."""

from __future__ import annotations

from functools import partial

import pytest

from ckptdiff.retrain.step_threads import run_all


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64, 65, 1000])
@pytest.mark.parametrize("announced", [None, 0, 3])
def test_each_piece_runs_once(count: int, announced: int | None) -> None:
    done: list[int] = []
    run_all((partial(done.append, i) for i in range(count)), count if announced is None else announced)
    assert sorted(done) == list(range(count))


@pytest.mark.parametrize("fails", [0, 5, 99])
def test_what_a_piece_raises_comes_out(fails: int) -> None:
    def piece(index: int) -> None:
        if index == fails:
            raise ValueError(f"piece {index}")

    with pytest.raises(ValueError, match=f"piece {fails}"):
        run_all((partial(piece, i) for i in range(100)), 100)
