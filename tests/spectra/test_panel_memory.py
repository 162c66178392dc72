from __future__ import annotations

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from ckptdiff.cli.group import ckptdiff
from ckptdiff.spectra.panels import PanelMemory


def test_what_fits_is_handed_on() -> None:
    memory = PanelMemory()
    rooms = {size: memory.take(size, size) for size in (100, 200, 300)}
    for room in rooms.values():
        assert room is not None
        memory.give(room)
    assert memory.take(150, 250) is rooms[200]
    assert memory.take(150, 300) is rooms[300]
    assert memory.take(100, 100) is rooms[100]


def test_what_fits_nobody_goes_back() -> None:
    memory = PanelMemory()
    for size, most in ((101, 1000), (10, 99), (1000, 999)):
        room = memory.take(100, 100)
        assert room is not None
        gone = weakref.ref(room)
        memory.give(room)
        del room
        taken = memory.take(size, most)
        assert (taken is None) == (size > most) and gone() is None
        assert taken is None or taken.size == size


@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_of_a_matrix_is_left_for_the_next(threads: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = {f"w{k}": rng.standard_normal((90 - 9 * (k % 4), 40 + k)).astype(np.float32) for k in range(8)}
    tuned = {name: side + (1e-3 * rng.standard_normal(side.shape)).astype(np.float32) for name, side in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")

    def found(*options: str) -> list[dict[str, object]]:
        words = ["diff", str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.safetensors"), *options]
        done = CliRunner().invoke(ckptdiff, [*words, "--spectra", "randomized", "--format", "json", "--no-progress"])
        assert done.exit_code == 0, done.output
        return [tensor["spectral"] for tensor in json.loads(done.stdout)["tensors"]]

    alone = [one for name in sorted(base) for one in found("--include", name)]
    assert found("--threads", str(threads)) == alone
