"""Checkpoints elsewhere on a cluster: nodes fetch for themselves, and nothing that is secret is shown anywhere."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN as HUB_TOKEN
from hub_server import Hub, hub_of
from ranged_server import Asked, Handler, Server, serving
from run_contents import contents
from s3_server import SECRET, TOKEN, ask, environment, s3_server

from ckptdiff.cli import main
from ckptdiff.errors import ClusterError
from ckptdiff.options import RayOptions

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

FIXTURES = Path(__file__).parents[2] / "fixtures"
SIGNATURE = "tr0ub4dor"
PASSWORD = "hunter2"
SECRETS = [SECRET, TOKEN, HUB_TOKEN, SIGNATURE, PASSWORD]


@dataclass(frozen=True)
class Elsewhere:
    """Hosts that hold both sides of a model, and the same on disk."""

    local: Path
    web: Server
    hub: Hub
    variables: dict[str, str]
    """That say where the others are, and let in; nodes do not have them."""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    obstore = pytest.importorskip("obstore")
    pytest.importorskip("moto")
    pytest.importorskip("huggingface_hub")
    root = tmp_path_factory.mktemp("elsewhere")
    local = root / "org"
    shutil.copytree(FIXTURES / "llama", local)
    with s3_server() as s3, hub_of(root) as hub, serving(root) as web, pytest.MonkeyPatch.context() as patch:
        variables = environment(s3) | hub.environment(root / "home")
        for name, value in environment(s3).items():
            patch.setenv(name, value)
        ask(f"{s3}/bucket", "PUT")
        store = obstore.store.S3Store("bucket", client_options={"allow_http": True})
        for file in local.rglob("*.*"):
            obstore.put(store, str(file.relative_to(root)), file)
        yield Elsewhere(local, web, hub, variables)


IN_ONE_JOB = """
import contextlib, io, json, sys
from ckptdiff.cli import main
from ckptdiff.cluster.joining import joined_cluster
from ckptdiff.options import Options, RayOptions
with joined_cluster(RayOptions(sys.argv[1]), Options(), lambda event: None):
    for line in json.loads(sys.argv[2]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(line)
        print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""
"""Commands of a process that has joined a cluster, each with its code, its report, and what else it said."""


def require_no_secret(nodes: Any, *texts: str) -> str:
    """What Ray shows of jobs. Neither there is a secret, nor in texts, in what Ray shows of tasks, or in its logs."""
    import ray
    from ray._private.state import state

    jobs = json.dumps(state.job_table(), default=str)
    logs = [path.read_bytes() for path in Path(nodes.head_node.get_logs_dir_path()).rglob("*") if path.is_file()]
    shown = [*texts, jobs, json.dumps(ray.timeline(), default=str), b"".join(logs).decode("latin-1")]
    assert all(shown)
    assert [secret for secret in SECRETS for text in shown if secret in text] == []
    return jobs


def test_figures_and_masks_are_those_of_the_files_and_no_secret_is_shown(
    nodes: Any, elsewhere: Elsewhere, tmp_path: Path
) -> None:
    local, report = tmp_path / "local.h5", tmp_path / "local.json"
    on_disk = [str(elsewhere.local / side) for side in ("base", "tuned")]
    assert main(["diff", *on_disk, "-o", str(local), "--format", "json", "-O", str(report)]) == 0
    web, out = elsewhere.web.url.replace("//", f"//me:{PASSWORD}@"), tmp_path / "out"
    out.mkdir()
    bucket = ["s3://bucket/org/base", "s3://bucket/org/tuned"]
    commands = {
        "no.h5": bucket,
        "s3.h5": [*bucket, "--ray-env", "AWS_*"],
        "http.h5": [f"{web}/org/base", f"{web}/org/tuned"],
        "hub.h5": ["hf://org/base", "org/tuned", "--stream", "--ray-env", "HF_*"],
    }
    asked = ["--engine", "ray", "--threads", "1", "-v", "--no-progress", "--format", "json", "-o"]
    lines = [["diff", *words, *asked, str(out / name)] for name, words in commands.items()]
    done = subprocess.run(
        [sys.executable, "-c", IN_ONE_JOB, nodes.address, json.dumps(lines)],
        env={**os.environ, "NO_PROXY": "*", **elsewhere.variables},
        capture_output=True,
        text=True,
        check=True,
    )
    (refused, *made) = map(json.loads, done.stdout.splitlines())
    # A node asks with what it knows itself, and says so.
    assert refused[0] == 2 and "error: node " in refused[2] and "--ray-env gives them" in refused[2], refused
    expected = json.loads(report.read_text())
    files = [out / name for name in commands if name != "no.h5"]
    assert sorted(out.iterdir()) == sorted(files)
    for (code, printed, said), file in zip(made, files, strict=True):
        assert code == 0, said
        found = json.loads(printed)
        assert found["tensors"] == expected["tensors"] and found["global"] == expected["global"]
        held = [{key: value for key, value in contents(one).items() if key != "provenance"} for one in (local, file)]
        assert held[0] == held[1] and len(held[0]) > 20
    written = (file.read_bytes().decode("latin-1") for file in files)
    assert f"{elsewhere.web.url}/org/base" in require_no_secret(nodes, done.stdout, *written)
    allowed = {asked.headers["Authorization"] for asked in elsewhere.web.asked}
    assert allowed == {"Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()}
    assert done.stderr == ""


def test_variables_that_nobody_has_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    words = ["diff", str(FIXTURES / "tied/base"), str(FIXTURES / "tied/tuned")]
    assert main([*words, "--engine", "ray", "--ray-env", "NO_SUCH_*"]) == 2
    assert "NO_SUCH_*" in capsys.readouterr().err
    assert main([*words, "--ray-env", "PATH"]) == 2
    assert "--engine ray" in capsys.readouterr().err


FAULTS: dict[str, tuple[Callable[[Handler, Asked], object], str]] = {
    "403": (lambda handler, asked: handler.reply(403), "HTTP 403 Forbidden"),
    "404": (lambda handler, asked: handler.reply(404), "HTTP 404 Not Found"),
    "503": (lambda handler, asked: handler.reply(503), "HTTP 503 Service Unavailable"),
    "200": (lambda handler, asked: handler.reply(200, b"x"), "206 Partial Content"),
    "replaced": (lambda handler, asked: handler.give(asked, ETag='"new"'), "replaced"),
}


def test_a_host_that_fails_a_node_ends_the_run_and_is_not_asked_by_another(
    nodes: Any, elsewhere: Elsewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ckptdiff
    from ckptdiff.errors import CheckpointError

    monkeypatch.setenv("CKPTDIFF_RETRY_SECONDS", "0")
    file = "org/base/model-00001-of-00002.safetensors?sig=" + SIGNATURE
    url = f"{elsewhere.web.url.replace('//', f'//me:{PASSWORD}@')}/{file}"
    try:
        for answer, said in FAULTS.values():
            asked_for = []

            def later(handler: Handler, asked: Asked, answer: Any = answer, asked_for: Any = asked_for) -> bool:
                if not (asked.range and asked.range[0]):
                    return False
                asked_for.append(asked.range)
                return answer(handler, asked) is None

            elsewhere.web.answer = later
            with pytest.raises(CheckpointError) as raised:
                out = tmp_path / "run.h5"
                asked = {"engine": "ray", "parallel": 1, "ray_env": ["CKPTDIFF_RETRY_SECONDS"], "threads": 1}
                ckptdiff.diff(url, elsewhere.local / "base/model-00001-of-00002.safetensors", out=out, **asked)
            told = str(raised.value)
            assert told.startswith("node ") and said in told and f"{elsewhere.web.url}/org/base/model-0000" in told
            # Once more at most, by the same task, with credentials that might be newer.
            assert 0 < len(asked_for) <= 2
            assert not list(tmp_path.iterdir())
            require_no_secret(nodes, told)
    finally:
        elsewhere.web.answer = lambda handler, asked: False


def test_what_goes_wrong_in_a_node_unforeseen_is_no_text_of_rays(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that fails by a mistake of ours: the text may hold a URL."""
    from ckptdiff.cluster import on_ray

    def failing(where: Sequence[Any], *given: Any) -> Any:
        from ckptdiff.cluster.node_work import _told

        def work() -> None:
            raise ValueError(f"odd: https://me:{PASSWORD}@host/a?sig={SIGNATURE}")

        return _told(work)

    monkeypatch.setattr(on_ray, "make_ready", failing)
    from ckptdiff.options import Options
    from ckptdiff.run.engine import run

    sides = [str(FIXTURES / "tied" / side) for side in ("base", "tuned")]
    with pytest.raises(ClusterError, match=r"^node .*not foreseen") as raised:
        run(*sides, options=Options(threads=1), on_ray=RayOptions())
    assert "ValueError: odd: https://host/a?..." in str(raised.value.found)
    require_no_secret(nodes, str(raised.value))
