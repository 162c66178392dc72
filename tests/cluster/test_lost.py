"""What is lost in the middle of a run on Ray: the command itself, a worker, a node, the head."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from patience import PATIENCE
from ranged_server import Asked, Handler, Server, serving
from run_contents import contents
from safetensors.numpy import save_file

from ckptdiff.cli import main
from ckptdiff.cluster.ray_tasks import RayHands
from ckptdiff.errors import ClusterError
from ckptdiff.events import Event, StageBegun, StageProgress
from ckptdiff.files.entry_file import digest_of, places_of
from ckptdiff.files.unfinished import Saving
from ckptdiff.options import Options, RayOptions, SpectraOptions
from ckptdiff.run.engine import run
from ckptdiff.run.kept_results import key_of
from ckptdiff.run.tasks import Grain
from ckptdiff.spectra.kept_spectra import KeptSpectra

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Four matrices of two blocks each, in two files: 64 MiB."""
    folder = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(5)
    base = {f"{name}.weight": rng.normal(0, 0.02, (1 << 10, 1 << 11)).astype(np.float32) for name in "abcd"}
    tuned = {name: values + (rng.random(values.shape) < 0.1).astype(values.dtype) for name, values in base.items()}
    for side, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, folder / f"{side}.safetensors")
    return str(folder / "base.safetensors"), str(folder / "tuned.safetensors")


STOPPING = """
import sys
from pathlib import Path
from ckptdiff import own_process
from ckptdiff.errors import ClusterError
from ckptdiff.files.unfinished import Saving
from ckptdiff.options import Options, RayOptions, SpectraOptions
from ckptdiff.run.engine import run
from ckptdiff.run.kept_results import KeptResults
from ckptdiff.run.tasks import Grain
from ckptdiff.spectra.kept_spectra import KeptSpectra

base, tuned, out, address, stage, seconds = sys.argv[1:]
owner, name = (KeptSpectra, "keep") if stage == "spectra" else (KeptResults, "keep_packed")
keep, stopped = getattr(owner, name), False

def stopping(self, *given):
    global stopped
    keep(self, *given)
    if not stopped:
        stopped = True
        print("stopped", flush=True)
        sys.stdin.readline()

setattr(owner, name, stopping)
asked = RayOptions(address, parallel=1, task_bytes=1, seconds=float(seconds))
options = Options(threads=1, spectra=SpectraOptions("randomized") if stage == "spectra" else None)
try:
    run(base, tuned, out=Path(out), options=options, on_ray=asked, saving=Saving(0, 0), grain=Grain(1, 1))
except ClusterError as error:
    print(error, flush=True)
    own_process.leave(2)
own_process.leave(0)
"""
"""A run that waits for a line when it has kept the first of what a stage gives."""


def stopped(pair: tuple[str, str], out: Path, address: str, stage: str, seconds: float) -> subprocess.Popen[str]:
    """A run in a process of its own, which has kept something of a stage."""
    command = [sys.executable, "-c", STOPPING, *pair, str(out), address, stage, str(seconds)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "stopped\n"
    return process


def entries(folder: Path) -> set[str]:
    """Keys of what an unfinished run keeps."""
    of = digest_of([(folder / "belongs.json").read_bytes()]).hex()
    return {key for path in folder.glob("*.done") for key in places_of(path, of)}


@pytest.mark.parametrize("stage", ["comparing", "spectra"])
def test_a_command_that_is_killed_goes_on_from_what_it_kept(
    nodes: Any, pair: tuple[str, str], tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    whole, out = tmp_path / "whole.h5", tmp_path / "run.h5"
    options = Options(threads=1, spectra=SpectraOptions("randomized") if stage == "spectra" else None)
    run(*pair, out=whole, options=options)
    process = stopped(pair, out, nodes.address, stage, 30)
    process.kill()
    process.communicate()
    shown = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert shown == {"whole.h5", "run.h5.part"}, "nothing under the final name"
    until = time.monotonic() + PATIENCE
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < until, "its tasks go on"
        time.sleep(0.1)
    kept_keys = entries(tmp_path / "run.h5.part")
    begun: list[str] = []
    measured: list[object] = []
    begin, keep = RayHands.begin, KeptSpectra.keep

    def counted(self: RayHands, batch: Any, passes: Any) -> Any:
        begun.extend(key_of(task, 0 if task.span is None else passes[task.span.tensor].turn) for task in batch)
        return begin(self, batch, passes)

    def counted_too(self: KeptSpectra, job: Any, spectra: Any) -> None:
        measured.append(job)
        keep(self, job, spectra)

    monkeypatch.setattr(RayHands, "begin", counted)
    monkeypatch.setattr(KeptSpectra, "keep", counted_too)
    heard: list[Event] = []
    asked = RayOptions(parallel=1, task_bytes=1)
    run(*pair, out=out, options=options, on_ray=asked, saving=Saving(0, 0), grain=Grain(1, 1), listener=heard.append)
    kept = {event.stage: event.kept for event in heard if isinstance(event, StageBegun)}
    assert kept_keys and kept_keys.isdisjoint(begun) and kept["comparing"] > 0
    if stage == "comparing":
        assert len(kept_keys) == 1 and len(begun) == len(set(begun)) > 6
    else:
        assert not begun and len(measured) == 3 and 0 < kept["spectra"] < 1
    assert contents(out) == contents(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"whole.h5", "run.h5"}


@pytest.fixture
def web(pair: tuple[str, str]) -> Iterator[Server]:
    with serving(Path(pair[0]).parent) as server:
        yield server


def killing(most: int) -> tuple[Callable[[Handler, Asked], bool], list[int]]:
    """A host that kills workers which ask for data, so many at most, and which ones it has killed."""
    killed: list[int] = []

    def answer(handler: Handler, asked: Asked) -> bool:
        if not (asked.range and asked.range[0]) or len(killed) >= most:
            return False
        for process in psutil.process_iter():
            try:
                ports = {each.laddr.port for each in process.net_connections() if each.laddr}
                worker = process.cmdline()[0].startswith("ray::measure_")
            except (psutil.Error, IndexError):
                continue
            if worker and handler.client_address[1] in ports and process.pid not in killed:
                killed.append(process.pid)
                process.kill()
        handler.close_connection = True
        return True

    return answer, killed


@pytest.mark.parametrize("most", [1, 100], ids=["once", "always"])
def test_workers_that_are_killed(nodes: Any, pair: tuple[str, str], web: Server, tmp_path: Path, most: int) -> None:
    """The report on stdout stays what it is: Ray says something of each."""
    import ray

    web.answer, killed = killing(most)
    out = tmp_path / "out" / "run.h5"
    out.parent.mkdir()
    sides = [f"{web.url}/base.safetensors", pair[1]]
    asked = ["--engine", "ray", "--ray-address", nodes.address, "--parallel", "1", "--threads", "1", "--format", "json"]
    done = subprocess.run(
        [sys.executable, "-m", "ckptdiff", "diff", *sides, *asked, "-o", str(out), "--no-progress"],
        env={**os.environ, "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ckptdiff: warning: Ray: " in done.stderr and "(node " in done.stderr
    if most == 1:
        assert done.returncode == 0 and len(killed) == 1, done.stderr
        local = tmp_path / "local.json"
        assert main(["diff", *pair, "--format", "json", "-O", str(local), "--no-progress"]) == 0
        found, expected = json.loads(done.stdout), json.loads(local.read_text())
        assert found["tensors"] == expected["tensors"] and out.exists()
        return
    assert done.returncode == 2 and done.stdout == "" and not list(out.parent.iterdir()), done.stderr
    assert len(killed) == 4, "three times more, and no more"
    names = [node["NodeID"][:8] for node in ray.nodes() if node["Alive"]]
    told = done.stderr.partition("ckptdiff: error: ")[2]
    assert "comparing a.weight" in told and "again and again (on " in told and any(name in told for name in names)
    assert "python-core-worker" in told and "--resume" in told


def test_the_only_node_with_room_is_lost_for_good(nodes: Any, pair: tuple[str, str], tmp_path: Path) -> None:
    node = nodes.add_node(num_cpus=2)

    def lose(event: Event) -> None:
        if isinstance(event, StageProgress) and event.stage == "comparing" and node in nodes.worker_nodes:
            nodes.remove_node(node, allow_graceful=True)

    asked = RayOptions(parallel=1, task_bytes=1, seconds=1)
    with pytest.raises(ClusterError, match="no node of the cluster can hold a task") as raised:
        run(*pair, out=tmp_path / "run.h5", options=Options(threads=2), on_ray=asked, listener=lose)
    assert "2 CPUs" in str(raised.value.expected) and "ray status" in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_head_that_is_gone(pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a cluster of its own; Ray would wait for it, and end the process with the code of a check that failed."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("NO_PROXY", "*")
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    made, out = Cluster(), tmp_path / "run.h5"
    try:
        head = made.add_node(num_cpus=1, include_dashboard=False, temp_dir=folder)
        running = stopped(pair, out, made.address, "comparing", 0)
        os.kill(head.all_processes["gcs_server"][0].process.pid, signal.SIGKILL)
        time.sleep(2.5)  # it looks at the nodes every two seconds
        told, _ = running.communicate("\n")
        assert running.returncode == 2 and "the head of the cluster is gone" in told and made.address in told, told
        assert [path.name for path in tmp_path.iterdir()] == ["run.h5.part"]
    finally:
        made.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def test_ray_runs_nothing_again_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of itself it does, where the memory of a node does not hold a task."""
    monkeypatch.delenv("RAY_task_oom_retries", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    sides = [str(FIXTURES / "tied" / side) for side in ("base", "tuned")]
    assert main(["diff", *sides, "--engine", "ray"]) == 2
    assert os.environ["RAY_task_oom_retries"] == "3"  # noqa: SIM112
