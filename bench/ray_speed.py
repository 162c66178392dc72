"""Time of a diff on two nodes of Ray with one processor each, beside two threads of one process; and its memory.

    python bench/ray_speed.py --size 8GiB [--folder /data] [--rounds 5] [--task-size 1GiB]

All on this machine. What Ray takes to start is not counted, nor the first round of each, in which its workers start and
kernels are loaded. Rounds take turns; medians, and the medians of the quotients within a round. Figures, histograms and
masks of both run files are compared. Memory is the peak of a whole command that joins the cluster, beside that of
one with --engine local.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from make_pair import make_pair, parse_size
from measure import run as run_command

from ckptdiff.options import Options, RayOptions
from ckptdiff.run.engine import run

LIMIT = 1.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="1GiB", help="bytes of a side")
    parser.add_argument("--tensors", default="llama", help="as make_pair.py has it: tiny for thousands of small ones")
    parser.add_argument("--task-size", default="1GiB", help="bytes that a task reads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write the pair; a temporary folder by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder, two_nodes() as address:
        make_pair(parse_size(given.size), Path(folder, "pair"), tensors=given.tensors)
        sides = str(Path(folder, "pair", "base")), str(Path(folder, "pair", "tuned"))
        asked = RayOptions(task_bytes=parse_size(given.task_size))
        seconds: dict[str, list[float]] = {"threads": [], "ray": []}
        files = {name: Path(folder, f"{name}.h5") for name in seconds}
        for number in range(given.rounds + 1):
            for name in sorted(seconds, reverse=bool(number % 2)):
                begun = time.perf_counter()
                if name == "ray":
                    run(*sides, out=files[name], options=Options(device="cpu", threads=1), on_ray=asked)
                else:
                    run(*sides, out=files[name], options=Options(device="cpu", threads=2))
                if number:
                    seconds[name].append(time.perf_counter() - begun)
        check(files["threads"], files["ray"])
        print("figures, histograms and masks are the same")
        for name, times in seconds.items():
            print(f"{name:8} {statistics.median(times):7.3f} s   ({', '.join(f'{each:.2f}' for each in times)})")
        ratio = statistics.median(b / a for a, b in zip(seconds["threads"], seconds["ray"], strict=True))
        print(f"ray / threads {ratio:.2f}, must be <= {LIMIT}: {'ok' if ratio <= LIMIT else 'MISSED'}")
        command = [sys.executable, "-m", "ckptdiff", "diff", *sides, "-o", str(files["ray"]), "--no-progress"]
        for name, more in {
            "one process": ["--threads", "2"],
            "driver of Ray": ["--threads", "1", "--engine", "ray", "--ray-address", address],
        }.items():
            print(f"peak memory, {name}: {run_command([*command, *more]).peak_rss >> 20} MiB")


@contextmanager
def two_nodes() -> Iterator[str]:
    """Two nodes with one processor each, which this process has joined; their address."""
    # Ray starts its workers at a niceness of 15, so that whoever else uses the machine would be counted.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    import ray
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: sockets lie in it
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=1, include_dashboard=False, temp_dir=folder)
        cluster.add_node(num_cpus=1, temp_dir=folder)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def check(one: Path, other: Path) -> None:
    """Raise SystemExit unless all numbers of two run files are the same."""
    with h5py.File(one) as first, h5py.File(other) as second:

        def compare(name: str, item: Any) -> None:
            if not isinstance(item, h5py.Dataset) or item.dtype.kind not in "uifb":
                return
            if not np.array_equal(item[()], second[name][()], equal_nan=item.dtype.kind == "f"):
                raise SystemExit(f"{name} differs")

        first.visititems(compare)


if __name__ == "__main__":
    main()
