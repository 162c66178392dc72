"""A real S3 server on loopback: moto's, in a process of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from patience import PATIENCE

SECRET = "c2VjcmV0a2V5"
TOKEN = "dG9rZW5vZnNlc3Npb24"


@contextmanager
def s3_server() -> Iterator[str]:
    """The server's URL, as long as the context lasts."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                ask(f"{url}/moto-api/data.json")
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < until, "the S3 server does not start"
                time.sleep(0.05)
        yield url
    finally:
        server.terminate()
        server.wait()


def ask(url: str, method: str = "GET") -> None:
    """Send a request, past any proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opener.open(urllib.request.Request(url, method=method)).close()


def environment(url: str) -> dict[str, str]:
    """Variables with which the server is found, and somebody is let in."""
    return {
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_SESSION_TOKEN": TOKEN,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
    }
