"""Checkpoints in a bucket: a real S3 server on loopback, whose answers are fetched through signed URLs."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_server import SECRET, TOKEN, ask, environment, s3_server
from safetensors.numpy import save_file

import ckptdiff
from ckptdiff.checkpoint import open_checkpoint
from ckptdiff.cli import main
from ckptdiff.errors import ChangedFileError, CheckpointError, RunFileError
from ckptdiff.options import Options
from ckptdiff.remote import object_store
from ckptdiff.run.engine import run

pytestmark = pytest.mark.slow
obstore = pytest.importorskip("obstore")
pytest.importorskip("moto")

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bucket with the base and the tuned side of a model; its store."""
    for name, value in {**environment(endpoint), "CKPTDIFF_RETRY_SECONDS": "1"}.items():
        monkeypatch.setenv(name, value)
    object_store._signed.clear()
    ask(f"{endpoint}/moto-api/reset", "POST")
    ask(f"{endpoint}/bucket", "PUT")
    store = obstore.store.S3Store("bucket", client_options={"allow_http": True})
    for file in (FIXTURES / "llama").rglob("*.*"):
        obstore.put(store, f"models/{file.relative_to(FIXTURES)}", file)
    yield store


@pytest.mark.usefixtures("bucket")
def test_a_run_gives_the_figures_of_the_files_and_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = []
    for where in (str(FIXTURES / "llama"), "s3://bucket/models/llama"):
        capsys.readouterr()
        sides = f"{where}/base", f"{where}/tuned/"
        assert main(["diff", *sides, "--format", "json", "-v", "-o", str(tmp_path / "run.h5")]) == 0
        told = capsys.readouterr()
        documents.append(json.loads(told.out))
        assert SECRET not in told.out + told.err and TOKEN not in told.out + told.err
    assert documents[0]["tensors"] == documents[1]["tensors"] and documents[0]["global"] == documents[1]["global"]
    held = (tmp_path / "run.h5").read_bytes()
    assert SECRET.encode() not in held and TOKEN.encode() not in held and b"X-Amz" not in held
    assert b"s3://bucket/models/llama/base/model-00001-of-00002.safetensors" in held


def test_files_and_indexes_and_folders_of_a_bucket_are_found(bucket: Any) -> None:
    local = open_checkpoint(FIXTURES / "llama/base")
    for url in ("s3://bucket/models/llama/base", "s3://bucket/models/llama/base/model.safetensors.index.json"):
        remote = open_checkpoint(url)
        assert list(remote.tensors) == list(local.tensors) and remote.index is not None
    file = "model-00001-of-00002.safetensors"
    assert len(open_checkpoint(f"s3://bucket/models/llama/base/{file}").tensors) > 1
    with pytest.raises(CheckpointError, match="holds no safetensors"):
        open_checkpoint("s3://bucket/models/llama")
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint("s3://bucket/absent.safetensors")
    obstore.delete(bucket, "models/llama/base/model.safetensors.index.json")
    assert list(open_checkpoint("s3://bucket/models/llama/base").tensors) == list(local.tensors)
    obstore.delete(bucket, f"models/llama/base/{file}")
    with pytest.raises(CheckpointError, match="shards are missing"):
        open_checkpoint("s3://bucket/models/llama/base")


@pytest.mark.usefixtures("bucket")
def test_a_bucket_that_is_not_there_or_closed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint("s3://no-such-bucket/model")
    assert "s3://no-such-bucket/model" in str(raised.value) and SECRET not in str(raised.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint("s3://bucket/models/llama/base")
    assert "s3://bucket/models/llama/base" in str(raised.value)


def test_a_run_file_goes_to_a_bucket_once_it_is_complete(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(here))
    sides = ["s3://bucket/models/llama/base", str(FIXTURES / "llama/tuned")]
    assert main(["diff", *sides, "-o", "s3://bucket/runs/run.h5", "--format", "json"]) == 0
    assert main(["diff", *sides, "-o", "s3://bucket/runs/other.h5", "--dry-run"]) == 0
    (tmp_path / "run.h5").write_bytes(obstore.get(bucket, "runs/run.h5").bytes())
    assert list(here.iterdir()) == [] and [item["path"] for item in obstore.list(bucket, "runs").collect()] == [
        "runs/run.h5"
    ]
    capsys.readouterr()
    assert main(["show", str(tmp_path / "run.h5"), "--format", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tensors"]) == 39
    for out, said in (
        ("s3://no-such-bucket/run.h5", "no-such-bucket"),
        ("https://host/run.h5", "nothing can be written"),
        ("s3://bucket/", "no name of an object"),
    ):
        assert main(["diff", *sides, "-o", out]) == 2
        assert said in capsys.readouterr().err and list(here.iterdir()) == []

    def refuse(event: object) -> None:
        if type(event).__name__ == "Finished":
            monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")

    # What hours have gone into is not lost with the upload.
    with pytest.raises(RunFileError, match="cannot be written") as raised:
        ckptdiff.diff(*sides, out="s3://bucket/runs/lost.h5", listener=refuse)
    (kept,) = here.rglob("lost.h5")
    assert str(kept) in str(raised.value) and kept.stat().st_size
    with ckptdiff.RunFile(kept) as run_file:
        assert len(run_file.load().tensors) == 39


def test_what_is_done_for_a_bucket_is_kept_until_it_is_there(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(here))
    sides, url = [str(FIXTURES / "llama" / side) for side in ("base", "tuned")], "s3://bucket/runs/kept.h5"

    def give_up(event: object) -> None:
        if type(event).__name__ == "StageBegun" and getattr(event, "stage", "") == "writing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ckptdiff.diff(*sides, out=url, resume=True, listener=give_up)
    (folder,) = here.iterdir()
    assert [path.name for path in folder.iterdir()] == ["kept.h5.part"] and folder.stat().st_mode & 0o077 == 0
    kept = sorted(folder.rglob("*"))
    assert main(["diff", *sides, "-o", url, "--resume", "--dry-run", "--no-progress"]) == 0
    assert sorted(folder.rglob("*")) == kept, "a dry run takes nothing away"
    capsys.readouterr()
    told: list[object] = []
    ckptdiff.diff(*sides, out=url, resume=True, listener=told.append)
    begun = next(one for one in told if type(one).__name__ == "StageBegun" and getattr(one, "stage", "") == "comparing")
    assert getattr(begun, "kept", 0) == getattr(begun, "total", 1) > 0, "nothing was measured again"
    assert not list(here.iterdir()) and obstore.head(bucket, "runs/kept.h5")["size"]

    def refuse(event: object) -> None:
        if type(event).__name__ == "Finished":
            monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")

    with monkeypatch.context() as patch, pytest.raises(RunFileError, match="cannot be written"):
        patch.setenv("AWS_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"])
        ckptdiff.diff(*sides, out=url, resume=True, listener=refuse)
    # What is complete is not made again, nor lost: it is said where it is.
    assert main(["diff", *sides, "-o", url, "--resume"]) == 2
    assert "was not uploaded" in (said := capsys.readouterr().err) and str(folder / "kept.h5") in said
    (folder / "kept.h5").unlink()
    folder.chmod(0o777)
    assert main(["diff", *sides, "-o", url, "--resume"]) == 2
    assert "not ours alone" in capsys.readouterr().err


def test_an_object_that_is_replaced_is_noticed(bucket: Any, tmp_path: Path) -> None:
    for side, value in (("base", 1.0), ("tuned", 2.0)):
        save_file({"w": np.full(300_000, value, np.float32)}, tmp_path / f"{side}.safetensors")
        obstore.put(bucket, f"{side}.safetensors", tmp_path / f"{side}.safetensors")

    def replace(event: object) -> None:
        if type(event).__name__ == "Started":
            save_file({"w": np.full(300_000, 3.0, np.float32)}, tmp_path / "new")
            obstore.put(bucket, "base.safetensors", tmp_path / "new")

    with pytest.raises(ChangedFileError, match="replaced"):
        run("s3://bucket/base.safetensors", "s3://bucket/tuned.safetensors", options=Options(), listener=replace)


@pytest.mark.usefixtures("bucket")
def test_a_signature_that_has_expired_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    address = object_store.BucketObject("s3://bucket/models/llama/base/model.safetensors.index.json")
    first, headers = address.request(False)
    assert headers == {} and "X-Amz-Signature" in first and SECRET not in first
    assert address.request(False)[0] == first, "signed once, as long as that is valid"
    assert TOKEN not in address.shown
    time.sleep(1.1)  # signatures differ by the second they are made in
    assert address.request(True)[0] != first
    later = time.monotonic() + 3000
    monkeypatch.setattr("time.monotonic", lambda: later)
    assert address.request(False)[0] != first
