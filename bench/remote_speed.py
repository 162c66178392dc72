"""Speed of a diff of checkpoints behind URLs, beside what obstore alone fetches of them.

    python bench/remote_speed.py --size 512MiB

Servers on loopback, each a process of its own: the tests' web server, and moto's for S3. The ways take turns: obstore
alone, which fetches all ranges of the files, sixteen at a time, and drops them; the ranges of a diff, fetched and
dropped by its own code; and all that a diff does once it has read headers, whose figures are compared with those of the
files on disk. Beside the medians of wall time stands processor time of this process for each GB, which other work
disturbs less; and the peak of a comparison in a process of its own beside what it was allowed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from make_pair import make_pair, parse_size
from measure import machine
from measure import run as measured

from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.figures.result import Diff
from ckptdiff.options import Options
from ckptdiff.run.engine import run, run_plan
from ckptdiff.run.planning import Plan, prepare
from ckptdiff.run.tasks import plan_tasks

TESTS = Path(__file__).parents[1] / "tests"
WEB_SERVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from ranged_server import serving
with serving(Path(sys.argv[2])) as served:
    print(served.url, flush=True)
    sys.stdin.read()
"""
AT_ONCE, PIECE = 16, 16 << 20
"""As in ckptdiff.remote.fetching."""
KEYS = {
    "CKPTDIFF_RETRY_SECONDS": "300",
    "AWS_ACCESS_KEY_ID": "someone",
    "AWS_SECRET_ACCESS_KEY": "c2VjcmV0a2V5",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
    "NO_PROXY": "*",
}
Sides = tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=parse_size, default=512 << 20, help="bytes of each side")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--server", choices=["http", "s3", "both"], default="both")
    parser.add_argument("--folder", type=Path, help="where to write the pair; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="where to write the results too")
    given = parser.parse_args()
    os.environ |= KEYS
    found: dict[str, Any] = {"machine": machine(), "size": given.size}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        make_pair(given.size, Path(folder))
        local = run(f"{folder}/base", f"{folder}/tuned", options=Options())
        for name, start in (("http", web_server), ("s3", s3_server)):
            if given.server in (name, "both"):
                with start(Path(folder)) as sides:
                    found[name] = compare(name, sides, local, given.rounds)
    print(f"{found['machine']['processor']}, {found['machine']['cores']} cores")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def compare(name: str, sides: Sides, local: Diff, rounds: int) -> dict[str, Any]:
    """The three ways, in turns, and a line for each."""
    plan = prepare(*sides, options=Options())
    files = {shard.path: shard.size for task in plan_tasks(plan.loads) for shard, *_ in plan.remote_parts(task)}
    total = sum(files.values())
    ways: dict[str, Callable[[], object]] = {
        "obstore": lambda: by_obstore(files),
        "fetching": lambda: by_fetching(plan),
        "diff": lambda: require_equal(run_plan(plan), local),
    }
    walls: dict[str, list[float]] = {way: [] for way in ways}
    busy: dict[str, list[float]] = {way: [] for way in ways}
    for place in range(rounds + 1):
        for way, work in ways.items():
            begun, before = time.perf_counter(), processor_seconds()
            work()
            if place:  # the first round warms up
                walls[way].append(time.perf_counter() - begun)
                busy[way].append(processor_seconds() - before)
    medians = {way: statistics.median(times) for way, times in walls.items()}
    found: dict[str, Any] = {}
    for way, wall in medians.items():
        found[way] = {
            "wall": walls[way],
            "GB/s": total / wall / 1e9,
            "of obstore": medians["obstore"] / wall,
            "processor seconds a GB": statistics.median(busy[way]) / total * 1e9,
        }
        print(
            f"{name:<5}{way:<10}{total / wall / 1e9:6.2f} GB/s {medians['obstore'] / wall:6.2f} of obstore"
            f"{found[way]['processor seconds a GB']:7.2f} processor seconds a GB"
        )
    allowed = -(-(plan.memory.of(1) + plan.memory.ahead) >> 20) + 100
    command = [sys.executable, "-m", "ckptdiff", "diff", *sides, "--max-memory", f"{allowed}M", "-q", "-O", os.devnull]
    found["peak"], found["allowed"] = command_peak(command), allowed << 20
    print(f"{name:<5}memory    {found['peak'] / 2**20:.0f} MiB of {allowed} MiB allowed")
    return found


def command_peak(command: list[str]) -> int:
    """Peak resident bytes of a comparison, which ends with 1 where the sides differ."""
    return measured(["sh", "-c", '"$@" || [ $? = 1 ]', "sh", *command]).peak_rss


def processor_seconds() -> float:
    """User and system time of this process."""
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return spent.ru_utime + spent.ru_stime


def by_obstore(files: dict[str, int]) -> None:
    """All ranges of the files by obstore alone, as many at a time as a diff has under way."""
    from obstore import get_range
    from obstore.store import HTTPStore, S3Store

    def fetch(part: tuple[Any, str, int, int]) -> None:
        store, path, start, end = part
        assert len(get_range(store, path, start=start, end=end)) == end - start

    parts = []
    for url, size in files.items():
        scheme, _, rest = url.partition("://")
        host, _, path = rest.partition("/")
        plain = {"allow_http": True}
        store = (
            S3Store(host, client_options=plain)
            if scheme == "s3"
            else HTTPStore(f"{scheme}://{host}", client_options=plain)
        )
        parts += [(store, path, start, min(start + PIECE, size)) for start in range(0, size, PIECE)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(fetch, parts))


def by_fetching(plan: Plan) -> None:
    """All that a diff reads, fetched ahead as it does, and dropped."""
    with open_shards("pread", plan.memory.ahead) as shards:
        tasks = [plan.remote_parts(task) for task in plan_tasks(plan.loads, plan.grain)]
        leases = shards.all_ahead(tasks)
        for parts, lease in zip(tasks, leases, strict=True):
            with lease:
                for shard, start, stop in parts:
                    tensor = plan.pairs[0].base
                    with shards[shard].window(tensor, start, stop, None):
                        pass


def require_equal(found: Diff, local: Diff) -> None:
    """Fail unless every digit is that of the local run."""
    for name, values in local.columns.items():
        if found.columns[name].tobytes() != values.tobytes():
            raise SystemExit(f"{name} is not that of the local run")


@contextmanager
def web_server(folder: Path) -> Iterator[Sides]:
    """The tests' own."""
    command = [sys.executable, "-c", WEB_SERVER, str(TESTS), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        url = server.stdout.readline().strip()
        try:
            yield f"{url}/base", f"{url}/tuned"
        finally:
            server.stdin.close()


@contextmanager
def s3_server(folder: Path) -> Iterator[Sides]:
    """moto's, with the pair in a bucket."""
    from obstore import put
    from obstore.store import S3Store

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ["AWS_ENDPOINT_URL"] = url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(f"{url}/moto-api/data.json")
            ask(urllib.request.Request(f"{url}/bucket", method="PUT"))
            store = S3Store("bucket", client_options={"allow_http": True})
            for file in folder.rglob("*.*"):
                put(store, str(file.relative_to(folder)), file)
            yield "s3://bucket/base", "s3://bucket/tuned"
        finally:
            server.terminate()


def wait_for(url: str) -> None:
    while True:
        try:
            return ask(url)
        except OSError:
            time.sleep(0.05)


def ask(request: str | urllib.request.Request) -> None:
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()


if __name__ == "__main__":
    main()
