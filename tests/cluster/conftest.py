"""Two nodes of Ray with one processor each, on this machine, for all tests of a process."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def nodes() -> Iterator[Any]:
    """The cluster, which this process has joined."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: sockets lie in it
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("NO_PROXY", "*")
        made = Cluster()
        try:
            made.add_node(num_cpus=1, include_dashboard=False, temp_dir=folder)
            made.add_node(num_cpus=1, temp_dir=folder)
            ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
            signal.signal(signal.SIGTERM, before)
            assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
            yield made
        finally:
            ray.shutdown()
            made.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
