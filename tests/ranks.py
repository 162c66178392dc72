"""Run a function on several ranks, each a process of its own on this machine, that talk by gloo."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from patience import PATIENCE


def on_ranks(count: int, function: str, folder: Path) -> None:
    """Call ``module:function`` with a folder on every rank, and wait for all; what a rank said is in the error."""
    meeting = Path(tempfile.mkdtemp(dir=folder))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        # Threads of many processes wait for each other longer than they compute.
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the machine's name stands for
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            command = [sys.executable, __file__, function, str(folder), str(meeting)]
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (meeting / f"rank{rank}").open("wb") as said:
                started.append(subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment))
        end = time.monotonic() + PATIENCE
        # One that failed never comes to where the others wait for it.
        while not any(one.poll() for one in started) and any(one.poll() is None for one in started):
            assert time.monotonic() < end, "the ranks do not end"
            time.sleep(0.02)
    finally:
        for one in started:
            one.kill()
            one.wait()
        told = "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(meeting.glob("rank*")))
    assert not any(one.returncode for one in started), told


def _main(function: str, folder: str, meeting: str) -> None:
    import torch

    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{meeting}/store",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=PATIENCE),
    )
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(Path(folder))
    torch.distributed.barrier()
    # Threads of a process group may abort a process that ends as others do.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
