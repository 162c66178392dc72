"""A folder of checkpoints, served on loopback; no proxy of the machine comes in between."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ranged_server import Server, serving


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Serves ``tmp_path / "served"``."""
    root = tmp_path / "served"
    root.mkdir()
    with serving(root) as served:
        yield served
