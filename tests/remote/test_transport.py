"""What is asked of a host, what of its answers is believed, and what is tried again."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from ranged_server import Asked, Handler, Server, serving

from ckptdiff.errors import ChangedFileError, CheckpointError, OptionError
from ckptdiff.remote.address import Url, is_url, shown, without_secrets
from ckptdiff.remote.transport import fetch, fetch_start, fetch_whole, patience

pytestmark = pytest.mark.slow

WHOLE = bytes(range(256)) * 40
SECRET = "c2VjcmV0"


@pytest.fixture(autouse=True)
def served(server: Server) -> None:
    (server.root / "file").write_bytes(WHOLE)
    (server.root / "empty").write_bytes(b"")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTDIFF_RETRY_SECONDS", "0.4")


def bytes_of(address: Url, start: int, stop: int) -> bytes:
    out = bytearray(stop - start)
    fetch(address, start, memoryview(out), fetch_start(address, 8)[1])
    return bytes(out)


def test_a_range_and_a_start_are_those_of_the_file(server: Server) -> None:
    address = Url(f"{server.url}/file")
    assert bytes_of(address, 1000, 9000) == WHOLE[1000:9000]
    assert fetch_start(address, 100)[0] == WHOLE[:100]
    start, version = fetch_start(address, 10**6)
    assert start == WHOLE and version.size == len(WHOLE) and version.etag
    assert fetch_start(Url(f"{server.url}/empty"), 8)[0] == b""
    assert fetch_whole(address, len(WHOLE)) == WHOLE
    assert {asked.headers["Accept-Encoding"] for asked in server.asked} == {"identity"}


def test_a_connection_serves_many_requests(server: Server) -> None:
    ports = set()

    def note(handler: Handler, asked: Asked) -> bool:
        ports.add(handler.client_address[1])
        return False

    server.answer = note
    address = Url(f"{server.url}/file")
    for start in range(5):
        assert bytes_of(address, start, 5000) == WHOLE[start:5000]
    assert len(ports) == 1


def test_what_is_too_long_is_not_read(server: Server) -> None:
    with pytest.raises(CheckpointError, match="too long"):
        fetch_whole(Url(f"{server.url}/file"), len(WHOLE) - 1)


def once(*faults: object):
    """Answers wrong for as long as there are faults, then as it should."""
    left = list(faults)

    def answer(handler: Handler, asked: Asked) -> bool:
        if not left:
            return False
        fault = left.pop(0)
        fault(handler, asked)
        return True

    return answer


def cut(handler: Handler, asked: Asked, after: int = 700) -> None:
    start, stop = asked.range or (0, len(WHOLE))
    place = f"bytes {start}-{stop - 1}/{len(WHOLE)}"
    etag = f'"{(handler.served.root / "file").stat().st_mtime_ns}"'
    handler.reply(206, WHOLE[start:stop], cut=after, Content_Range=place, ETag=etag)


def unavailable(handler: Handler, asked: Asked) -> None:
    handler.reply(503)


def too_many(handler: Handler, asked: Asked) -> None:
    handler.reply(429, Retry_After="0")


def hang_up(handler: Handler, asked: Asked) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def test_what_passes_is_tried_again_from_where_it_stopped(server: Server) -> None:
    address = Url(f"{server.url}/file")
    version = fetch_start(address, 8)[1]
    server.asked.clear()
    server.answer = once(unavailable, cut, too_many, hang_up, cut)
    out = bytearray(8000)
    fetch(address, 1000, memoryview(out), version)
    assert bytes(out) == WHOLE[1000:9000]
    starts = [start for start, _ in server.ranges_of("file")]
    assert starts[:2] == [1000, 1000] and set(starts) == {1000, 1700, 2400}


WRONG = {
    "a whole file": (lambda handler, asked: handler.reply(200, WHOLE), "206 Partial Content"),
    "another range": (
        lambda handler, asked: handler.give(asked, Content_Range=f"bytes 0-7/{len(WHOLE)}"),
        "another range",
    ),
    "no range": (lambda handler, asked: handler.give(asked, Content_Range=""), "no range"),
    "a wrong length": (lambda handler, asked: handler.give(asked, Content_Length="12"), "12 bytes"),
    "compressed": (lambda handler, asked: handler.give(asked, Content_Encoding="gzip"), "gzip"),
    "another ETag": (lambda handler, asked: handler.give(asked, ETag='"other"'), "replaced"),
    "another size": (lambda handler, asked: handler.give(asked, Content_Range="bytes 1000-1999/5000"), "replaced"),
    "shrunk": (lambda handler, asked: handler.reply(416, Content_Range="bytes */100"), "replaced"),
    "gone": (lambda handler, asked: handler.reply(404), "404 Not Found"),
    "forbidden": (lambda handler, asked: handler.reply(403), "403 Forbidden"),
    "credentials": (lambda handler, asked: handler.reply(401), "401 Unauthorized"),
    "not satisfiable": (lambda handler, asked: handler.reply(416, Content_Range=f"bytes */{len(WHOLE)}"), "416"),
    "unavailable": (unavailable, "503 Service Unavailable"),
    "too many": (too_many, "429 Too Many Requests"),
    "cut short": (lambda handler, asked: cut(handler, asked, 0), "cut short after 0 of 1000 bytes"),
    "hung up": (hang_up, "cannot be fetched"),
    "elsewhere": (lambda handler, asked: handler.reply(302, Location="ftp://127.0.0.1/x"), "ftp"),
    "nowhere": (lambda handler, asked: handler.reply(302, Location="/file"), "again and again"),
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_answer_is_an_error_that_names_the_url_without_its_secrets(server: Server, fault: str) -> None:
    answer, said = WRONG[fault]
    address = Url(f"{server.url.replace('//', f'//me:{SECRET}@')}/file?sig={SECRET}")
    version = fetch_start(address, 8)[1]
    server.answer = lambda handler, asked: answer(handler, asked) is None
    with pytest.raises(CheckpointError) as raised:
        fetch(address, 1000, memoryview(bytearray(1000)), version)
    text = str(raised.value)
    assert said in text and f"{server.url}/file?" in text and SECRET not in text
    assert isinstance(raised.value, ChangedFileError) == (said == "replaced")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("host", ["127.0.0.1:1", "no-such-host.invalid"])
def test_a_host_that_is_not_there_is_given_up(host: str) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be fetched, tried again for 0\.4 seconds"):
        fetch_start(Url(f"http://{host}/file"), 8)


def test_a_redirect_takes_no_credentials_to_another_host(server: Server, tmp_path: Path) -> None:
    with serving(tmp_path / "served", "localhost") as other:
        server.answer = lambda handler, asked: handler.reply(302, Location=f"{other.url}/file?token=given") is None
        address = Url(f"{server.url.replace('//', f'//me:{SECRET}@')}/file?sig={SECRET}")
        assert bytes_of(address, 5, 50) == WHOLE[5:50]
        assert all(asked.headers["Authorization"] for asked in server.asked)
        assert len(server.asked) == 1, "where it leads to is asked at once from then on"
        for asked in other.asked:
            assert SECRET not in str(asked.headers) and SECRET not in asked.path
            assert not {"authorization", "referer", "cookie"} & {name.lower() for name in asked.headers}


def test_credentials_stay_with_their_host(server: Server) -> None:
    server.answer = lambda handler, asked: asked.path == "/old" and handler.reply(307, Location="/file") is None
    address = Url(f"{server.url.replace('//', '//me:word@')}/old")
    assert bytes_of(address, 5, 50) == WHOLE[5:50]
    assert all(asked.headers["Authorization"] == "Basic bWU6d29yZA==" for asked in server.asked)


@pytest.mark.parametrize("status", [400, 401, 403, 410])
def test_a_redirect_that_has_expired_is_asked_for_again(server: Server, status: int) -> None:
    valid = ["first"]

    def answer(handler: Handler, asked: Asked) -> bool:
        if asked.path == "/old":
            return handler.reply(302, Location=f"/file?sig={valid[0]}") is None
        return not asked.path.endswith(valid[0]) and handler.reply(status) is None

    server.answer = answer
    address = Url(f"{server.url}/old")
    version = fetch_start(address, 8)[1]
    valid[0] = "second"
    out = bytearray(100)
    fetch(address, 100, memoryview(out), version)
    assert bytes(out) == WHOLE[100:200]


def test_what_is_shown_of_a_url_tells_it_from_others() -> None:
    ours, theirs = (shown(f"https://u:{SECRET}@host:8443/a/b.safetensors?sig={SECRET}{n}#f") for n in (1, 2))
    assert ours.startswith("https://host:8443/a/b.safetensors?...") and ours != theirs and SECRET not in ours + theirs
    text = f"error 'https://u:{SECRET}@h/a?b={SECRET}', {ours}: http://h/x?token={SECRET}, s3://b/k"
    cleared = without_secrets(text)
    assert SECRET not in cleared and ours in cleared and "https://h/a?..." in cleared and "s3://b/k" in cleared
    for bucket in ("s3://bucket/folder/", "abfss://container@account.dfs.core.windows.net/folder"):
        assert shown(bucket) == bucket
    assert is_url("S3://b/k") and is_url("https://h") and not is_url("org/name") and not is_url("file:///x")
    with pytest.raises(CheckpointError, match="not a possible URL") as raised:
        shown(f"http://u:{SECRET}@[host/x?{SECRET}")
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan"])
def test_patience_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    assert patience() == 30.0
    monkeypatch.setenv("CKPTDIFF_RETRY_SECONDS", text)
    with pytest.raises(OptionError, match="CKPTDIFF_RETRY_SECONDS"):
        patience()
