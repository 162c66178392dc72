"""Checkpoints in Azure: its emulator, azurite, on loopback (npm install -g azurite)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE

from ckptdiff.cli import main
from ckptdiff.remote import object_store

obstore = pytest.importorskip("obstore")
AZURITE = os.environ.get("AZURITE", "azurite-blob")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(AZURITE) is None, reason="azurite is not installed: npm install -g azurite"),
]

FIXTURES = Path(__file__).parents[2] / "fixtures"
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Of azurite, and no secret: its documentation names it."""


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A container with both sides of a model."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(tmp_path / "azurite"), "--silent"]
    url = f"http://127.0.0.1:{port}/{ACCOUNT}"
    for name, value in {
        "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": KEY,
        "AZURE_STORAGE_ENDPOINT": url,
        "AZURE_STORAGE_ALLOW_HTTP": "true",
        "AZURE_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    object_store._signed.clear()
    with subprocess.Popen([AZURITE, *place, "--skipApiVersionCheck"], stdout=subprocess.DEVNULL) as server:
        try:
            until = time.monotonic() + PATIENCE
            while True:
                try:
                    create(url, "models")
                    break
                except urllib.error.HTTPError:
                    raise
                except OSError:
                    assert server.poll() is None and time.monotonic() < until, "azurite does not start"
                    time.sleep(0.1)
            store = obstore.store.from_url("az://models", client_options={"allow_http": True})
            for file in (FIXTURES / "llama").rglob("*.*"):
                obstore.put(store, str(file.relative_to(FIXTURES)), file)
            yield store
        finally:
            server.terminate()


def create(url: str, name: str) -> None:
    """Make a container, by a request that is signed as Azure's documentation of Shared Key says."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
    fixed = "".join(f"{key}:{headers[key]}\n" for key in sorted(headers))
    signed = f"PUT{chr(10) * 12}{fixed}/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    digest = hmac.digest(base64.b64decode(KEY), signed.encode(), hashlib.sha256)
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    request = urllib.request.Request(f"{url}/{name}?restype=container", method="PUT", headers=headers)
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()


def test_a_run_gives_the_figures_of_the_files_and_goes_back_to_the_container(
    container: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for where, out in ((str(FIXTURES / "llama"), tmp_path / "run.h5"), ("az://models/llama", "az://models/run.h5")):
        capsys.readouterr()
        assert main(["diff", f"{where}/base", f"{where}/tuned", "--format", "json", "-o", str(out), "-v"]) == 0
        told = capsys.readouterr()
        assert KEY not in told.out + told.err and "sig=" not in told.out + told.err
        found.append(json.loads(told.out))
    assert found[0]["tensors"] == found[1]["tensors"] and found[0]["global"] == found[1]["global"]
    stored = bytes(obstore.get(container, "run.h5").bytes())
    assert KEY.encode() not in stored and b"sig=" not in stored and b"az://models/llama/base/model-0000" in stored
    assert main(["diff", "az://models/absent.safetensors", "az://models/llama/tuned"]) == 2
    told = capsys.readouterr().err
    assert "az://models/absent.safetensors" in told and "404" in told and "sig=" not in told
