"""Whole runs on the processor's arrays, and on arrays of another device that hands out nothing unasked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from array_libraries import library_called, panels_of, refuse_silent_transfers

from ckptdiff.linalg.stages import Panel, PanelSource
from ckptdiff.spectra.panels import StoredPanels

STRICT = library_called("strict")


class Streamed:
    """A matrix that is read in every pass, its panels put on the device of array-api-strict."""

    library, kept = STRICT, False
    stack: tuple[int, ...] = ()

    def __init__(self, stored: StoredPanels) -> None:
        self._stored = stored
        self.long, self.short, self.dtype = stored.long, stored.short, stored.dtype

    def panels(self) -> Iterator[Panel]:
        for panel in self._stored.panels():
            yield Panel(STRICT.put(panel.base), STRICT.put(panel.delta))

    def sample(self, count: int) -> Any:
        return STRICT.put(self._stored.sample(count))


def source_of(panels: StoredPanels, kept: bool, gpu: None, room: Any = None) -> PanelSource:
    """In the place of :func:`ckptdiff.spectra.spectra_gpu.source_of`."""
    if not kept:
        return Streamed(panels)
    base, delta = np.concatenate([[panel.base, panel.delta] for panel in panels.cached(room).panels()], axis=1)
    return panels_of(STRICT)(base, delta, max(1, panels._entries // panels.short))


@pytest.fixture(params=["numpy", pytest.param("strict", marks=pytest.mark.slow)])
def each_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Measure and factor matrices with one library and the other."""
    if request.param == "strict":
        refuse_silent_transfers(monkeypatch)
        monkeypatch.setattr("ckptdiff.spectra.job.source_of", source_of)
        monkeypatch.setattr("ckptdiff.lora.factoring.source_of", source_of)
    return str(request.param)
