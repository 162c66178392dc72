"""Checkpoints in Google Cloud Storage: a server on loopback that answers as its XML interface does.

It lists, and gives what a URL is signed for: the signature is verified as Google's documentation of V4 has it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import pytest
from ranged_server import Asked, Handler, Server, serving

from ckptdiff.cli import main
from ckptdiff.remote import object_store

pytestmark = pytest.mark.slow
pytest.importorskip("obstore")
pytest.importorskip("cryptography")

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture
def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, str]]:
    """A bucket "models" with both sides of a model, and the key whose signatures it takes."""
    from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = generate_private_key(65537, 2048)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    shutil.copytree(FIXTURES / "llama", tmp_path / "served/models/llama")
    with serving(tmp_path / "served") as server:
        account = {"gcs_base_url": server.url, "client_email": "me@here", "private_key": private}
        (tmp_path / "account.json").write_text(json.dumps(account | {"private_key_id": "1"}))
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
        monkeypatch.setenv("CKPTDIFF_RETRY_SECONDS", "1")
        server.answer = lambda handler, asked: answer(server, key.public_key(), handler, asked)
        object_store._signed.clear()
        yield server, private


def answer(server: Server, public: object, handler: Handler, asked: Asked) -> bool:
    parts = urlsplit(asked.path)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    if query.get("list-type") == "2":
        prefix = query.get("prefix", "")
        files = [path for path in (server.root / "models" / prefix).iterdir() if path.is_file()]
        entries = "".join(
            f"<Contents><Key>{prefix}{path.name}</Key><Size>{path.stat().st_size}</Size><ETag>&quot;1&quot;</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for path in sorted(files)
        )
        body = f"<?xml version='1.0'?><ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        handler.reply(200, body.encode(), Content_Type="application/xml")
        return True
    if not is_signed(public, handler, parts.path, query):
        handler.reply(403)
        return True
    return False


def is_signed(public: object, handler: Handler, path: str, query: dict[str, str]) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
    from cryptography.hazmat.primitives.hashes import SHA256

    signature = bytes.fromhex(query.pop("X-Goog-Signature", ""))
    canonical = "&".join(f"{quote(name, safe='')}={quote(query[name], safe='')}" for name in sorted(query))
    host = "host:storage.googleapis.com\n"  # which obstore signs for, whatever the endpoint
    request = f"{handler.command}\n{quote(unquote(path))}\n{canonical}\n{host}\nhost\nUNSIGNED-PAYLOAD"
    scope = query.get("X-Goog-Credential", "/").partition("/")[2]
    digest = hashlib.sha256(request.encode()).hexdigest()
    text = f"GOOG4-RSA-SHA256\n{query.get('X-Goog-Date')}\n{scope}\n{digest}"
    try:
        public.verify(signature, text.encode(), PKCS1v15(), SHA256())  # type: ignore[attr-defined]
    except InvalidSignature:
        return False
    return True


def test_a_run_gives_the_figures_of_the_files(
    google: tuple[Server, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, private = google
    found = []
    for where in (str(FIXTURES / "llama"), "gs://models/llama"):
        capsys.readouterr()
        code = main(
            ["diff", f"{where}/base", f"{where}/tuned", "--format", "json", "-o", str(tmp_path / "run.h5"), "-v"]
        )
        told = capsys.readouterr()
        assert code == 0, told.err
        assert "X-Goog" not in told.out + told.err and private[50:90] not in told.out + told.err
        found.append(json.loads(told.out))
    assert found[0]["tensors"] == found[1]["tensors"] and found[0]["global"] == found[1]["global"]
    stored = (tmp_path / "run.h5").read_bytes()
    assert b"X-Goog" not in stored and b"gs://models/llama/base/model-0000" in stored
    assert any(asked.range and asked.range[0] for asked in server.asked), "data came in ranges"
