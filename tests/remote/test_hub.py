"""Models of the hub, by its own library, from a server on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest
from hub_server import COMMIT, TOKEN, Hub, hub_of
from ranged_server import Asked, Handler

from ckptdiff.checkpoint import open_checkpoint
from ckptdiff.cli import main

pytestmark = pytest.mark.slow
pytest.importorskip("huggingface_hub")

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Two models: one in the middle of its repository, one in a folder, with a file that its index does not name."""
    root = tmp_path / "repos"
    shutil.copytree(FIXTURES / "llama/base", root / "org/base")
    shutil.copytree(FIXTURES / "llama/tuned", root / "org/tuned/last")
    (root / "org/base/consolidated.safetensors").write_bytes(b"never read")
    (root / "org/base/config.json").write_text('{"tie_word_embeddings": false}')
    with hub_of(root) as held:
        held.revisions["org/tuned"] = {"step-300"}
        yield held


Call = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def call(hub: Hub, tmp_path: Path) -> Call:
    """Run the command line with this hub, whose address the library takes from the environment when it is imported."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ckptdiff", *arguments],
            env=os.environ | hub.environment(tmp_path / "home") | {"CKPTDIFF_RETRY_SECONDS": "1"} | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of the same files on disk."""
    report = tmp_path_factory.mktemp("local") / "report.json"
    sides = str(FIXTURES / "llama/base"), str(FIXTURES / "llama/tuned")
    assert main(["diff", *sides, "--format", "json", "-O", str(report)]) == 0
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def downloaded(home: Path) -> set[str]:
    return {path.name for path in home.rglob("snapshots/**/*") if path.is_file()}


def test_models_are_downloaded_once_and_compared_like_folders(
    hub: Hub, call: Call, tmp_path: Path, local: dict[str, Any]
) -> None:
    command = ("diff", "org/base", "hf://org/tuned@step-300/last", "--format", "json", "-o", "run.h5")
    done = call(*command)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tensors"] == local["tensors"] and found["global"] == local["global"]
    for name, side in (("org/base", found["base"]), ("org/tuned", found["tuned"])):
        assert (side["repo"], side["commit"]) == (name, COMMIT)
        files = [Path(shard["file"]) for shard in side["shards"]]
        assert side["hashes"] == {f.name: f"sha256:{hashlib.sha256(f.read_bytes()).hexdigest()}" for f in files}
    assert "consolidated.safetensors" not in downloaded(tmp_path / "home")
    assert "does not name consolidated.safetensors" in done.stderr
    for text in (done.stdout, done.stderr, (tmp_path / "run.h5").read_bytes().decode("latin-1")):
        assert TOKEN not in text and hub.signature not in text
    with h5py.File(tmp_path / "run.h5") as file:
        assert COMMIT in str(dict(file.attrs)) or COMMIT in str(file["provenance"][()])
    hub.store.asked.clear()
    assert json.loads(call(*command).stdout)["global"] == local["global"]
    assert not hub.store.asked, "what the cache holds is not fetched again"
    hub.hub.asked.clear()
    assert json.loads(call(*command, HF_HUB_OFFLINE="1").stdout)["global"] == local["global"]
    assert not hub.hub.asked and not hub.store.asked


def test_models_are_read_where_they_are_and_nothing_is_kept(
    hub: Hub, call: Call, tmp_path: Path, local: dict[str, Any]
) -> None:
    done = call("diff", "org/base@main", "hf://org/tuned/last", "--stream", "--format", "json", "-o", "run.h5")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tensors"] == local["tensors"] and found["global"] == local["global"]
    assert found["base"]["path"] == f"hf://org/base@{COMMIT}" and found["base"]["repo"] == "org/base"
    assert not downloaded(tmp_path / "home")
    assert hub.store.asked and all(asked.range for asked in hub.store.asked)
    assert any(asked.headers["Authorization"] == f"Bearer {TOKEN}" for asked in hub.hub.asked)
    assert not any(asked.headers["Authorization"] or asked.headers["Referer"] for asked in hub.store.asked)
    for text in (done.stdout, done.stderr, (tmp_path / "run.h5").read_bytes().decode("latin-1")):
        assert TOKEN not in text and hub.signature not in text


def test_shards_of_equal_hash_are_read_once(hub: Hub, call: Call) -> None:
    shutil.copytree(FIXTURES / "llama/base", hub.hub.root / "org/copy")
    done = call("diff", "org/base", "org/copy", "--dry-run", "--format", "json")
    assert json.loads(done.stdout)["total_bytes"] == open_checkpoint(FIXTURES / "llama/base").nbytes
    hub.store.asked.clear()
    done = call("diff", "org/base", "org/copy", "--stream", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["global"]["unchanged_bitwise"] == 1.0
    data = [asked for asked in hub.store.asked if asked.range and asked.range[0]]
    assert data and all("/org/base/" in asked.path for asked in data)


def data_of(hub: Hub) -> list[Asked]:
    """What was asked for of large files beyond their headers."""
    return [asked for asked in hub.store.asked if asked.range is None or asked.range[0]]


@pytest.fixture
def half_tuned(hub: Hub) -> tuple[str, str]:
    """A model whose first file is that of the base, and whose second is not."""
    shutil.copytree(FIXTURES / "llama/base", hub.hub.root / "org/half")
    second = hub.hub.root / "org/half/model-00002-of-00002.safetensors"
    stored = bytearray(second.read_bytes())
    stored[-1] ^= 1
    second.write_bytes(stored)
    return "org/base", "org/half"


def test_shards_of_equal_hash_are_downloaded_once(
    hub: Hub, call: Call, tmp_path: Path, half_tuned: tuple[str, str]
) -> None:
    command = ("diff", *half_tuned, "--format", "json")
    found = json.loads(call(*command).stdout)
    asked = [asked.path.partition("?")[0] for asked in data_of(hub)]
    files = ["/org/base/model-00001-of-00002.safetensors", "/org/base/model-00002-of-00002.safetensors"]
    assert sorted(asked) == [*files, "/org/half/model-00002-of-00002.safetensors"]
    assert found["counts"]["same_bytes"] > 0 and found["counts"]["unread"] == 0
    blobs = [path.resolve() for path in sorted((tmp_path / "home").rglob("snapshots/**/model-00001*"))]
    assert len(blobs) == 2 and blobs[0] != blobs[1] and blobs[0].samefile(blobs[1])
    hub.store.asked.clear()
    # Each of the two stands by itself, and is whole to the hub's own library.
    shutil.rmtree(next((tmp_path / "home").rglob("models--org--base")))
    assert call("inspect", "org/half", HF_HUB_OFFLINE="1").returncode == 0
    assert json.loads(call(*command).stdout)["global"] == found["global"]
    assert [path.partition("?")[0] for path in (one.path for one in data_of(hub))] == [files[1]]


def test_shards_of_equal_hash_are_left_where_they_are_by_quick(
    hub: Hub, call: Call, tmp_path: Path, half_tuned: tuple[str, str]
) -> None:
    command = ("diff", *half_tuned, "--quick", "--format", "json", "-o", "run.h5")
    done = call(*command)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {asked.path.partition("?")[0].rpartition("/")[2] for asked in data_of(hub)} == {
        "model-00002-of-00002.safetensors"
    }
    assert downloaded(tmp_path / "home") == {
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
    }
    full = json.loads(call("diff", *half_tuned, "--format", "json").stdout)
    assert found["counts"]["unread"] == full["counts"]["same_bytes"] > 0
    assert found["global"]["changed"] == full["global"]["changed"] > 0 and found["global"]["rel_norm"] is None
    read = [row for row in found["tensors"] if not row.get("unread")]
    assert read and all(row in full["tensors"] for row in read)
    # The run's checkpoints are found again, those of its own commits, whatever their files are called here.
    assert call("spectra", "add", "run.h5").returncode == 0
    hub.store.asked.clear()
    streamed = call(*command, "--stream")
    assert json.loads(streamed.stdout)["tensors"] == found["tensors"]
    assert {asked.path.partition("?")[0] for asked in data_of(hub)} == {
        f"/{name}/model-00002-of-00002.safetensors" for name in half_tuned
    }
    hub.store.asked.clear()
    shutil.copytree(hub.hub.root / "org/base", hub.hub.root / "org/copy")
    done = call("diff", "org/base", "org/copy", "--quick", "--format", "json", HF_HOME=str(tmp_path / "new"))
    assert json.loads(done.stdout)["global"]["unchanged_bitwise"] == 1.0, done.stderr
    assert not data_of(hub) and not downloaded(tmp_path / "new")


def test_every_command_reads_models_where_they_are(hub: Hub, call: Call, tmp_path: Path) -> None:
    """With --stream none of them leaves a file in the cache."""
    base, tuned = "org/base", "hf://org/tuned/last"
    local = [str(FIXTURES / "llama" / side) for side in ("base", "tuned")]
    stored = ("--compare", "stored", "--mask", "bitwise")
    commands = [
        ("diff", base, tuned, "--stream", *stored, "-o", "run.h5"),
        ("spectra", "add", "run.h5", "--stream"),
        ("overlap", "run.h5", "run.h5", "--base", base, "--values", "--stream"),
        ("mask", "export", "run.h5", "--layout", "patch", "-o", "mask.safetensors", "--stream"),
        ("mask", "export", "run.h5", "--layout", "shira", "--rank", "1", "-o", "shira", "--stream"),
        ("patch", "apply", base, "mask.safetensors", "-o", "masked", "--stream"),
        ("patch", "make", *local, "-o", "step.ckptdelta"),
        ("patch", "apply", base, "step.ckptdelta", "-o", "made", "--stream"),
        ("patch", "verify", base, "step.ckptdelta", "--tuned", tuned, "--stream"),
        ("track", base, tuned, "--stream"),
        ("claims", base, tuned, "--spectra", "randomized", "--stream"),
        ("lora", base, tuned, "--rank", "2", "-o", "adapter", "--stream"),
        ("inspect", base, "--hash"),
    ]
    lines = json.dumps(commands)
    environment = os.environ | hub.environment(tmp_path / "home")
    done = subprocess.run(
        [sys.executable, "-c", ALL_OF_THEM, lines],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [code for code, _ in told] == [0] * len(commands), told
    assert not downloaded(tmp_path / "home")
    assert all(TOKEN not in said and hub.signature not in said for _, said in told)
    # What patches make of it is the tuned side, file by file.
    for path in (FIXTURES / "llama/tuned").iterdir():
        assert (tmp_path / "made" / path.name).read_bytes() == path.read_bytes()
    assert (
        main(["diff", str(tmp_path / "masked"), local[1], "--compare", "stored", "--fail-if", "global.changed>0"]) == 0
    )
    for words in (("--in-place",), ("-o", "out", "--with-files", "--stream")):
        refused = call("patch", "apply", base, "step.ckptdelta", *words)
        assert refused.returncode == 2 and "elsewhere" in refused.stderr, refused.stderr
    assert not downloaded(tmp_path / "home") and not (tmp_path / "out").exists()


def test_a_signature_that_expires_during_a_run_is_renewed(hub: Hub, call: Call, local: dict[str, Any]) -> None:
    signatures = ["c2lnbmVk"]
    stored = hub.store.answer

    def expiring(handler: Handler, asked: Asked) -> bool:
        if asked.range and asked.range[0] and hub.signature == signatures[0]:
            hub.signature = "bmV3"  # the old one is refused from now on
        return stored(handler, asked)

    hub.store.answer = expiring
    done = call("diff", "org/base", "hf://org/tuned/last", "--stream", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["global"] == local["global"]


ALL_OF_THEM = """
import contextlib, io, json, sys
from ckptdiff.cli import main
for line in json.loads(sys.argv[1]):
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        code = main(line)
    print(json.dumps([code, told.getvalue()]))
"""
"""Commands of one process, each with its code and what it said."""
FAILURES = {
    "no model": ("org/absent", "no such model in the hub"),
    "no revision": ("org/base@absent", "no such revision"),
    "no folder": ("hf://org/base/absent", "no such file or folder"),
    "no name": ("hf://base", "not the name of a model"),
    "a data set": ("hf://datasets/org/base", "not the name of a model"),
    "gated": ("org/gated", "gated"),
    "broken": ("org/broken", "does not answer as it should"),
}


def test_what_cannot_be_had_is_said(hub: Hub, tmp_path: Path) -> None:
    hub.refused = {"org/gated": (403, "GatedRepo"), "org/broken": (400, "")}
    out, tuned = tmp_path / "run.h5", str(FIXTURES / "llama/tuned")
    asked = [(name, said, stream) for name, said in FAILURES.values() for stream in ([], ["--stream"])]
    lines = json.dumps([["diff", name, tuned, "-o", str(out), *stream] for name, _, stream in asked])
    environment = os.environ | hub.environment(tmp_path / "home") | {"CKPTDIFF_RETRY_SECONDS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALL_OF_THEM, lines], env=environment, cwd=tmp_path, capture_output=True, check=True
    )
    for (name, said, _), line in zip(asked, done.stdout.splitlines(), strict=True):
        code, told = json.loads(line)
        assert code == 2 and said in told and name in told, told
        assert TOKEN not in told and "Traceback" not in told
    assert not out.exists()


def test_a_gated_model_without_a_token_is_said(hub: Hub, call: Call, tmp_path: Path) -> None:
    hub.gated = {"org/base"}
    for stream in ([], ["--stream"]):
        done = call("diff", "org/base", "org/base", "-o", "run.h5", *stream, HF_TOKEN="")
        assert done.returncode == 2 and "error: the model is gated" in done.stderr, done.stderr
        assert "HF_TOKEN" in done.stderr and "org/base" in done.stderr and not (tmp_path / "run.h5").exists()


def test_a_hub_that_is_away_or_must_not_be_asked_is_said(hub: Hub, call: Call) -> None:
    done = call("inspect", "org/base", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "not in the cache" in done.stderr, done.stderr
    done = call("inspect", "org/base", HF_ENDPOINT="http://127.0.0.1:1")
    assert done.returncode == 2 and "cannot be reached" in done.stderr, done.stderr


def test_a_local_folder_of_that_name_wins(hub: Hub, call: Call, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "llama/base", tmp_path / "org/base")
    done = call("diff", "org/base", "org/base", "-v")
    assert done.returncode == 0 and not hub.hub.asked, done.stderr
    assert "org/base is what lies here" in done.stderr
