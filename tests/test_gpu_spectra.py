"""`bench/gpu_spectra.py` on the host device: it runs, and figures of both devices are alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE

BENCH = Path(__file__).parents[1] / "bench"


@pytest.mark.slow
def test_spectra_are_timed_and_compared(tmp_path: Path) -> None:
    program = [BENCH / "gpu_spectra.py", "--small", "--scratch", tmp_path, "--figures", tmp_path / "figures.json"]
    command = [sys.executable, BENCH / "host_device.py", tmp_path / "kernels", *program]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert found.returncode == 0, found.stderr
    rows = [row for row in json.loads((tmp_path / "figures.json").read_text())["rows"] if "pair" in row]
    assert [(row["mode"], row["wrong"]) for row in rows] == [
        ("randomized", False),
        ("exact", False),
        ("randomized", False),
        ("adapter", False),
        ("randomized", False),
    ]
