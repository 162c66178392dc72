"""Run files without an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_runs import histograms

from ckptdiff.figures.result import Diff
from ckptdiff.options import MaskRule
from ckptdiff.runfile.writer import RunFileWriter


@pytest.fixture(scope="session")
def make_run() -> Callable[[Path, Diff], Path]:
    """``make_run(path, diff)``: a run file of a diff, without masks, with histograms that are not of its tensors."""

    def make(path: Path, diff: Diff) -> Path:
        diff = replace(diff, mask_rule="none")
        with RunFileWriter(path, rule=MaskRule("none"), compare="bf16") as writer:
            for start in range(0, len(diff.tensors), 1000):
                writer.add_histograms(histograms(diff.tensors[start : start + 1000], start))
            writer.finish(diff)
        return path

    return make
