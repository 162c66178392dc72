from __future__ import annotations

import pytest
from array_libraries import Made, library_called, panels_of, refuse_silent_transfers


@pytest.fixture(params=["numpy", "strict"])
def on_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Pairs of a library; those of array-api-strict lie on a device that hands out nothing unasked."""
    if request.param == "strict":
        refuse_silent_transfers(monkeypatch)
    return panels_of(library_called(request.param))
