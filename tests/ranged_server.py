"""A web server on loopback that hands out ranges of the files of a folder, and misbehaves as a test asks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Asked:
    """A request."""

    path: str
    """With its query."""
    range: tuple[int, int] | None
    """First byte and the one behind the last."""
    headers: Message


@dataclass
class Server:
    """What it serves and what it was asked for."""

    root: Path
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    answer: Callable[[Handler, Asked], bool] = lambda handler, asked: False
    """A test's own way to answer; it returns whether it did."""

    def ranges_of(self, name: str) -> list[tuple[int, int]]:
        """Ranges that were asked for of a file, in order."""
        return [asked.range for asked in self.asked if urlsplit(asked.path).path.endswith(name) and asked.range]


class Handler(BaseHTTPRequestHandler):
    """Answers one request after the other on a connection."""

    protocol_version = "HTTP/1.1"
    served: Server

    def log_message(self, *args: object) -> None:
        """Nothing goes to the screen of a test."""

    def do_GET(self) -> None:
        given = self.headers.get("Range")
        span = None
        if given is not None:
            first, last = given.removeprefix("bytes=").split("-")
            span = int(first), int(last) + 1
        asked = Asked(self.path, span, self.headers)
        self.served.asked.append(asked)
        if not self.served.answer(self, asked):
            self.give(asked)

    do_HEAD = do_GET  # noqa: N815

    def give(self, asked: Asked, **headers: str) -> None:
        """The range of the file, as it should be; `headers` replace its own, with ``_`` for ``-``."""
        path = self.served.root / unquote(urlsplit(asked.path).path).lstrip("/")
        if not path.is_file():
            self.reply(404)
            return
        size, etag = path.stat().st_size, f'"{path.stat().st_mtime_ns}"'
        if asked.range is None:
            self.reply(200, path.read_bytes(), ETag=etag)
            return
        start, stop = asked.range
        if start >= size:
            self.reply(416, Content_Range=f"bytes */{size}")
            return
        with path.open("rb") as file:
            file.seek(start)
            part = file.read(stop - start)
        place = f"bytes {start}-{start + len(part) - 1}/{size}"
        self.reply(206, part, **{"Content_Range": place, "ETag": etag} | headers)

    def reply(self, status: int, body: bytes = b"", cut: int | None = None, **headers: str) -> None:
        """An answer; `cut` closes the connection after so many bytes of its body."""
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        self.close_connection |= cut is not None


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *args: object) -> None:
        """A client that went away is no error here."""


@contextmanager
def serving(root: Path, host: str = "127.0.0.1") -> Iterator[Server]:
    """Serve a folder as long as the context lasts."""
    server = Server(root)
    handler = type("Bound", (Handler,), {"served": server})
    with _Quiet((host, 0), handler) as listening:
        server.url = f"http://{host}:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listening.shutdown()
            thread.join()
