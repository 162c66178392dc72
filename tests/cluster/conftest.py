"""Two nodes of Ray with one processor each, on this machine, for all tests of a process."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Read when Ray is first imported. Whatever the machine has set up, clusters of tests have a token of their own.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
# Workers that are nice would wait for all other tests on a busy machine.
os.environ |= {"RAY_worker_niceness": "0"}
# Ray does not spill to a disk that is 95 % full, as that of a busy machine may be; the tests spill a few hundred MB.
os.environ |= {"RAY_local_fs_capacity_threshold": "1"}


@pytest.fixture(scope="session")
def nodes() -> Iterator[Any]:
    """The cluster, which this process has joined."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: sockets lie in it
    here, before = Path.cwd(), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "*")
        made = Cluster()
        try:
            made.add_node(num_cpus=1, include_dashboard=False, temp_dir=folder)
            made.add_node(num_cpus=1, temp_dir=folder)
            patch.chdir(folder)  # workers import from the working directory first
            ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
            signal.signal(signal.SIGTERM, before)
            patch.chdir(here)
            yield made
        finally:
            ray.shutdown()
            made.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
