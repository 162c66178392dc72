"""A cluster of Ray gives the run file of one machine, whatever befalls its nodes."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patience import PATIENCE
from run_contents import contents
from safetensors.numpy import save_file
from several_blocks import save_several_blocks
from stopped_process import ended, go_on, stopped_at
from told_stages import told_stages

import ckptdiff
from ckptdiff.cli import main
from ckptdiff.cluster.joining import joined_cluster
from ckptdiff.cluster.node_work import Sent
from ckptdiff.cluster.on_ray import Cluster, Node
from ckptdiff.cluster.ray_failures import failure_of
from ckptdiff.errors import ChangedFileError, CheckpointError, CkptdiffError, ClusterError, DeviceError
from ckptdiff.events import Event, Note, StageBegun, StageProgress, TensorsDone, ignore
from ckptdiff.files.unfinished import Saving
from ckptdiff.options import MaskRule, Options, RayOptions, SpectraOptions
from ckptdiff.run.engine import run
from ckptdiff.run.tasks import Grain

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

FIXTURES = Path(__file__).parents[2] / "fixtures"
FINE = Grain(blocks=1, tensors=7)
SMALL = RayOptions(task_bytes=3 << 20)
"""Tasks of a block or two."""


class GivenUpError(Exception):
    """Raised by a listener."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_several_blocks(tmp_path_factory.mktemp("large"), 5)


def of(name: str) -> tuple[str, str]:
    return str(FIXTURES / name / "base"), str(FIXTURES / name / "tuned")


CASES = {
    "abs": ("large", Options()),
    "top": ("large", Options(compare="stored", mask=MaskRule("top", 20))),
    "rel": ("large", Options(compare="stored", mask=MaskRule("rel", 1e-3), io="mmap")),
    "none": ("large", Options(mask=MaskRule("none"))),
    "spectra": ("moe", Options(spectra=SpectraOptions("exact"))),
    "randomized": ("llama", Options(spectra=SpectraOptions("randomized"), exclude=("*norm*",))),
    "assembled": ("vlm", Options(mask=MaskRule("bitwise"))),
    "odd": ("odd", Options(mask=MaskRule("bitwise"))),
    "quantised": ("fp8", Options(mask=MaskRule("bitwise"))),
    "reference": ("tied", Options(device="reference")),
}


@pytest.mark.parametrize("case", CASES)
def test_every_digit_and_mask_is_that_of_one_machine(
    nodes: Any, case: str, large: tuple[str, str], tmp_path: Path
) -> None:
    name, options = CASES[case]
    options = replace(options, threads=1)
    pair = large if name == "large" else of(name)
    local, away = tmp_path / "local.h5", tmp_path / "away.h5"
    run(*pair, out=local, options=options, grain=FINE)
    heard: list[Event] = []
    run(*pair, out=away, options=options, grain=FINE, on_ray=SMALL, listener=heard.append)
    assert contents(away) == contents(local)
    stages = told_stages(heard)
    assert {"preparing nodes", "comparing", "writing", *(["spectra"] if options.spectra else [])} <= stages.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["away.h5", "local.h5"]


def test_nothing_depends_on_how_large_tasks_are_or_how_many(nodes: Any, large: tuple[str, str], tmp_path: Path) -> None:
    found = []
    for number, asked in enumerate((RayOptions(parallel=1, task_bytes=1), RayOptions(task_bytes=9 << 20))):
        run(*large, out=tmp_path / f"{number}.h5", options=Options(threads=1), on_ray=asked)
        found.append(contents(tmp_path / f"{number}.h5"))
    ckptdiff.diff(*large, out=tmp_path / "api.h5", threads=1, engine="ray", parallel=3)
    assert found[0] == found[1] == contents(tmp_path / "api.h5")


def worker_of(node: Any) -> int:
    """The process of a worker of a node, which takes its next task too."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    where = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    worker: int = ray.get(ray.remote(num_cpus=1)(lambda: os.getpid()).options(scheduling_strategy=where).remote())
    return worker


def stopping(worker: int, lose: Callable[[], object]) -> Callable[[Event], None]:
    """A listener that stops a worker before it gets a task, and loses it when nothing else is left to wait for."""
    done: list[float] = []
    lost = False

    def listen(event: Event) -> None:
        nonlocal lost
        if isinstance(event, StageBegun) and event.stage == "comparing":
            os.kill(worker, signal.SIGSTOP)
        if isinstance(event, StageProgress) and event.stage == "comparing":
            done.append(event.done)
            if not lost and len(done) >= 10 and len(set(done[-10:])) == 1:
                lost = True
                lose()

    return listen


@pytest.mark.parametrize("whole", [False, True], ids=["worker", "node"])
def test_what_a_lost_worker_or_node_had_is_done_again(
    nodes: Any, large: tuple[str, str], tmp_path: Path, whole: bool
) -> None:
    options = Options(threads=1)
    local, away = tmp_path / "local.h5", tmp_path / "away.h5"
    run(*large, out=local, options=options, grain=FINE)
    node = nodes.add_node(num_cpus=1) if whole else next(iter(nodes.worker_nodes))
    worker = worker_of(node)
    lost = []

    def lose() -> None:
        if whole:
            nodes.remove_node(node, allow_graceful=False)
        os.kill(worker, signal.SIGKILL)
        lost.append(worker)

    run(*large, out=away, options=options, grain=FINE, on_ray=SMALL, listener=stopping(worker, lose))
    assert lost and contents(away) == contents(local)


def test_a_file_that_changes_is_told_with_the_node(nodes: Any, large: tuple[str, str], tmp_path: Path) -> None:
    """It comes as what a task gives, so that Ray has nothing to try again."""
    tuned = tmp_path / "tuned.safetensors"
    tuned.write_bytes(Path(large[1]).read_bytes())

    def damage(event: Event) -> None:
        if isinstance(event, TensorsDone):
            os.truncate(tuned, tuned.stat().st_size - 1000)

    asked = RayOptions(parallel=1, task_bytes=1)
    with pytest.raises(ChangedFileError, match=r"^node .*planned with") as caught:
        run(large[0], str(tuned), out=tmp_path / "run.h5", options=Options(threads=1), on_ray=asked, listener=damage)
    assert caught.value.file == str(tuned)
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.safetensors"]


def test_a_node_that_reads_another_file_than_was_planned_with_says_so(tmp_path: Path) -> None:
    from ckptdiff.checkpoint import open_checkpoint

    file = tmp_path / "a.safetensors"
    save_file({"a": np.ones(4, np.float32)}, file)
    (shard,) = open_checkpoint(str(file)).shards
    sent = Sent(None, "/")
    elsewhere = replace(shard, device=shard.device + 1, inode=shard.inode + 1)  # as another node numbers them
    assert sent.found_here(elsewhere) == shard
    assert Sent(None, str(tmp_path)).found_here(replace(shard, path=file.name)) == shard
    os.utime(file, ns=(0, 7))
    with pytest.raises(ChangedFileError, match="planned with") as caught:
        sent.found_here(shard)
    assert "modified at 7 ns" in str(caught.value.found) and caught.value.file == str(file)
    file.unlink()
    with pytest.raises(CheckpointError, match="No such file") as missing:
        sent.found_here(shard)
    assert missing.value.file == str(file)


def test_a_path_that_a_node_cannot_see_is_told_with_the_node(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for side in ("base", "tuned"):
        save_file({"a": np.ones(4, np.float32)}, tmp_path / f"{side}.safetensors")
    monkeypatch.chdir(tmp_path)
    found = "/proc/self/cwd"  # leads elsewhere in each process
    sides = [f"{found}/base.safetensors", f"{found}/tuned.safetensors"]
    assert main(["diff", *sides, "-o", "run.h5", "--engine", "ray"]) == 2
    said = capsys.readouterr().err
    assert "error: node " in said and "cannot be seen there" in said and sides[0] in said
    assert not (tmp_path / "run.h5").exists()


@pytest.mark.parametrize("version", ["0.0.1", ""], ids=["other", "none"])
def test_a_node_with_another_ckptdiff_or_none_is_refused_by_name(nodes: Any, tmp_path: Path, version: str) -> None:
    (tmp_path / "ckptdiff").mkdir()
    code = f"__version__ = {version!r}" if version else "raise ImportError('no ckptdiff')"
    (tmp_path / "ckptdiff" / "__init__.py").write_text(code)
    node = nodes.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(tmp_path)})
    try:
        with pytest.raises(ClusterError, match=f"{node.node_id[:8]}.*does not run what") as caught:
            run(*of("tied"), options=Options(threads=1), on_ray=RayOptions())
        assert f"ckptdiff {ckptdiff.__version__}" in str(caught.value.expected)
        assert f"ckptdiff {version or 'none'}" in str(caught.value.found)
    finally:
        nodes.remove_node(node)


def test_an_object_store_that_is_full_spills_to_disk(nodes: Any, tmp_path: Path) -> None:
    import ray

    run(*of("llama"), out=tmp_path / "local.h5", options=Options(threads=1), grain=FINE)
    held = [ray.put(np.zeros(40 << 20, np.uint8)) for _ in range(8)]  # more than it has
    run(*of("llama"), out=tmp_path / "away.h5", options=Options(threads=1), grain=FINE, on_ray=SMALL)
    assert len(held) == 8 and contents(tmp_path / "away.h5") == contents(tmp_path / "local.h5")


def test_what_ray_cannot_do_is_told_with_what_to_do() -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    errors = ray.exceptions
    cases: list[tuple[Exception, str, str]] = [
        (errors.ObjectStoreFullError("full"), "object store of the cluster is full", "--parallel"),
        (errors.OutOfDiskError("full"), "disk that it spills to", "--parallel"),
        (errors.RayTaskError("f", "trace", errors.OutOfDiskError("full")), "disk that it spills to", "--parallel"),
        (errors.OutOfMemoryError("killed"), "want of memory again and again (on a, b)", "--threads"),
        (errors.WorkerCrashedError(), "again and again (on a, b)", "logs"),
        (errors.NodeDiedError("gone"), "again and again (on a, b)", "why it was lost"),
        (errors.RayTaskError("f", "trace", ValueError("odd")), "comparing w failed (on a, b)", "report"),
        (errors.RayTaskError("f", "trace", OSError("odd")), "comparing w failed (on a, b)", "report"),
        (OSError("Broken pipe"), "the node that this process belongs to is gone", "why it was lost"),
    ]
    for error, problem, hint in cases:
        found = failure_of(ray, error, "comparing w", ["a", "b"])
        assert isinstance(found, ClusterError) and problem in found.problem and hint in str(found.hint)


def test_a_node_that_nobody_has_is_not_waited_for(nodes: Any) -> None:
    """Neither more processors than any node has, nor a GPU where none has one."""
    with pytest.raises(ClusterError, match="no node of the cluster can hold a task") as caught:
        run(*of("tied"), options=Options(threads=2), on_ray=RayOptions())
    assert "2 CPUs" in str(caught.value.expected) and "1" in str(caught.value.found)
    asked = Options(threads=1, device="cuda", spectra=SpectraOptions())
    with pytest.raises(ClusterError, match="no node") as caught:
        run(*of("tied"), options=asked, on_ray=RayOptions())
    assert "1 GPU" in str(caught.value.expected)


def test_nodes_that_are_lost_for_good_end_the_run() -> None:
    found = [Node("a", "a", 2, 1 << 30), Node("b", "b", 8, 1 << 20)]
    cluster = Cluster(None, RayOptions(seconds=0), Options(), lambda: found)
    cluster.require_room(2, 1 << 30)
    with pytest.raises(ClusterError, match="no node") as caught:
        cluster.require_room(3, 1 << 30)
    assert "3 CPUs and 1024 MiB" in str(caught.value.expected)
    patient = Cluster(None, RayOptions(seconds=3600), Options(), list)
    patient.require_room(1, 1)


def test_spectra_go_where_the_gpus_are(nodes: Any) -> None:
    """Ray believes that a node has one; the node says what it has."""
    try:
        import cupy  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("CuPy is installed: there may be a GPU")
    node = nodes.add_node(num_cpus=1, num_gpus=1)
    try:
        asked = Options(threads=1, device="cuda", spectra=SpectraOptions())
        with pytest.raises(DeviceError, match=rf"^node .*{node.node_id[:8]}"):
            run(*of("tied"), options=asked, on_ray=RayOptions())
    finally:
        nodes.remove_node(node)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["diff", *of("tied"), *arguments]) == 2
    return capsys.readouterr().err


def test_nobody_at_the_address(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        said = refused(capsys, "--engine", "ray", "--ray-address", address)
    assert "nobody answers" in said and address in said and "ray status" in said
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        said = refused(capsys, "--engine", "ray")
        thread.join()
    assert "no Ray cluster" in said and address in said


def test_options_of_ray_without_it_or_of_another_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--engine ray" in refused(capsys, "--parallel", "2")
    assert "--engine ray" in refused(capsys, "--ray-address", "host:6379")
    assert "run ckptdiff on a machine" in refused(capsys, "--engine", "ray", "--ray-address", "ray://host:10001")
    assert "0 or more" in refused(capsys, "--engine", "ray", "--parallel", "-1")


def test_without_ray_the_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert "pip install 'ckptdiff[ray]'" in refused(capsys, "--engine", "ray")


def test_ctrl_c_cancels_and_leaves_nothing(nodes: Any, large: tuple[str, str], tmp_path: Path) -> None:
    import ray

    out = tmp_path / "run.h5"
    process = stopped_at(
        "ckptdiff.cluster.ray_tasks:RayHands.begin", 2,
        "diff", *large, "-o", out, "--threads", "1", "--engine", "ray", "--ray-address", nodes.address,
    )  # fmt: skip
    process.send_signal(signal.SIGINT)
    go_on(process)
    code, said = ended(process)
    assert code == 130 and said.strip().endswith("interrupted") and not list(tmp_path.iterdir())
    until = time.monotonic() + PATIENCE
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_the_command_line_joins_by_address(nodes: Any, tmp_path: Path) -> None:
    import subprocess
    import sys

    out = tmp_path / "run.h5"
    command = [sys.executable, "-m", "ckptdiff", "diff", *of("tied"), "-o", str(out), "--threads", "1", "-v"]
    made = subprocess.run([*command, "--engine", "ray", "--ray-address", nodes.address], capture_output=True, text=True)
    assert made.returncode == 0 and "2 nodes of Ray" in made.stderr and "raylet" not in made.stderr
    run(*of("tied"), out=tmp_path / "local.h5", options=Options(threads=1))
    assert contents(out) == contents(tmp_path / "local.h5")


def test_a_dry_run_prints_tasks_bytes_and_memory(
    nodes: Any, large: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["diff", *large, "--dry-run", "--engine", "ray", "--threads", "1", "--no-progress"]
    assert main(asked) == 0
    text = capsys.readouterr().out
    assert "ray       2 nodes, 1 task of 1 GiB, 2 at once, 1 thread and " in text
    assert main([*asked, "--parallel", "5", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ray"] | {"task_memory": 0} == {
        "nodes": 2, "tasks": 1, "task_bytes": 1 << 30, "task_threads": 1, "task_memory": 0, "at_once": 5
    }  # fmt: skip
    assert found["ray"]["task_memory"] > found["chunk_bytes"] > 0
    assert main(["diff", *large, "--dry-run", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["ray"] is None


@pytest.mark.parametrize("first", ["ray", "local"])
@pytest.mark.parametrize("case", ["top", "spectra"])
def test_what_one_engine_kept_the_other_goes_on_from(
    nodes: Any, case: str, first: str, large: tuple[str, str], tmp_path: Path
) -> None:
    name, options = CASES[case]
    options = replace(options, threads=1)
    pair = large if name == "large" else of(name)
    whole, parts = tmp_path / "whole.h5", tmp_path / "parts.h5"
    run(*pair, out=whole, options=options, grain=FINE)
    stage = "spectra" if options.spectra else "comparing"
    told = 0

    def half(event: Event) -> None:
        nonlocal told
        told += isinstance(event, StageProgress | TensorsDone) and getattr(event, "stage", stage) == stage
        if stage == "spectra" and isinstance(event, StageProgress) and event.stage == stage and event.done > 0.3:
            raise GivenUpError
        if stage == "comparing" and isinstance(event, StageProgress) and event.done > 10 << 20:
            raise GivenUpError

    engines = {"ray": RayOptions(task_bytes=5 << 20), "local": None}
    always = Saving(0, 0)
    with pytest.raises(GivenUpError):
        run(*pair, out=parts, options=options, grain=FINE, saving=always, on_ray=engines.pop(first), listener=half)
    (second,) = engines.values()
    heard: list[Event] = []
    run(*pair, out=parts, options=options, grain=FINE, saving=always, on_ray=second, listener=heard.append)
    begun = next(event for event in heard if isinstance(event, StageBegun) and event.stage == stage)
    assert begun.kept > 0
    assert contents(parts) == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.h5", "whole.h5"]


def test_what_nodes_tell_of_tasks_under_way_is_added_up(nodes: Any) -> None:
    import ray

    from ckptdiff.cluster.ray_tasks import UnderWay

    with joined_cluster(RayOptions(), Options(), ignore) as cluster:
        underway = UnderWay(cluster)
        for number, done in ((0, 5), (1, 7), (2, 11)):
            ray.get(cluster.tally.tell.remote(number, done, f"node {number}"))
        underway.tasks = {0: None, 2: None}
        until = time.monotonic() + PATIENCE
        while underway.done() != 16:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert ray.get([cluster.tally.nodes.remote(number) for number in (0, 1)]) == [["node 0"], []]
        ray.kill(cluster.tally, no_restart=False)
        while underway.done() != 0:  # a new one knows nothing yet
            assert time.monotonic() < until
            time.sleep(0.05)
        underway.tasks.clear()


def test_nodes_of_other_processors_are_told_of(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptdiff.kernel_cache.processor_name", lambda: "riscv64 none, 0")
    heard: list[Event] = []
    found = run(*of("tied"), options=Options(threads=1), on_ray=RayOptions(), listener=heard.append)
    (said,) = [text for text in found.warnings if "differ in processors or kernels" in text]
    assert "here: riscv64" in said and Note(said, warning=True) in heard


def test_errors_of_ours_travel_whole() -> None:
    import pickle

    error = CheckpointError("odd", file="a", tensor="t", expected=1, found="2", hint="look")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, CkptdiffError) and str(again) == str(error)
