"""Fetch ranges of remote files over HTTP, and trust no answer that is not exactly what was asked for.

Each answer has to be 206 with the range that was asked for, of a file of the size and the ETag that it had at first.
Redirects are followed here: to another host no header with credentials is sent, and no Referer, which would carry a
signed query along. What may pass is tried again, with growing pauses, from the byte where it stopped.
"""

from __future__ import annotations

import http.client
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from http import HTTPStatus
from typing import Any
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from ckptdiff.errors import CheckpointError, OptionError
from ckptdiff.interrupts import raise_pending
from ckptdiff.remote.address import Address
from ckptdiff.remote.answers import Answer, check_range, refused, status, total
from ckptdiff.remote.remote_file import Version

__all__ = ["fetch", "fetch_start", "fetch_whole", "patience"]

_CHUNK = 1 << 20
"""Bytes read between two looks at whether the process is to end."""
_TIMEOUT = 10.0
"""Seconds without a byte, after which a connection counts as lost."""
_REDIRECTS = 5
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_MOVED = (301, 302, 303, 307, 308)
_REFUSED = (400, 401, 403, 410)
"""What hosts answer to a signature that has expired."""


class _PassingError(Exception):
    """What may be gone at the next attempt: what it was, and in how many seconds it is worth one."""

    def __init__(self, found: str, wait: float = 0.0) -> None:
        self.found, self.wait = found, wait
        super().__init__(found)


class _Kept(threading.local):
    """Connections of one thread, by scheme and host."""

    def __init__(self) -> None:
        self.connections: dict[tuple[str, str], http.client.HTTPConnection] = {}


_kept = _Kept()
_moved: dict[Address, tuple[str, dict[str, str]]] = {}
"""Where redirects have led to; forgotten once that is refused."""


def patience() -> float:
    """Seconds for which a request that brings nothing is tried again: 30, or ``CKPTDIFF_RETRY_SECONDS``."""
    text = os.environ.get("CKPTDIFF_RETRY_SECONDS", "30")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise OptionError("CKPTDIFF_RETRY_SECONDS is no number of seconds", expected="0 or more", found=text)
    return seconds


def fetch(
    address: Address, start: int, out: memoryview, version: Version, stopped: Callable[[], bool] = lambda: False
) -> None:
    """Fill `out` with the bytes of a file from `start` on.

    Parameters
    ----------
    address : Address
    start : int
    out : memoryview of bytes
    version : Version
        That the file must still have.
    stopped : callable
        Whether nobody wants them any more; InterruptedError is raised then.

    Raises
    ------
    ChangedFileError
        If the file has been replaced.
    CheckpointError
        If it cannot be had, or not in ranges.
    """
    done = 0

    def attempt(renew: bool) -> None:
        nonlocal done
        span = start + done, start + out.nbytes
        with _asked(address, span, renew) as answer:
            check_range(address, answer, span, version)
            while done < out.nbytes:
                if stopped():
                    raise InterruptedError("the run was given up")
                count = answer.readinto(out[done : done + _CHUNK])
                if not count:
                    raise _PassingError(f"an answer cut short after {done} of {out.nbytes} bytes")
                done += count

    if out.nbytes:
        _persist(address, attempt, lambda: done, stopped)


def fetch_start(address: Address, count: int) -> tuple[bytes, Version]:
    """The first `count` bytes of a file, fewer if it is shorter, and what it is now; errors as :func:`fetch` has."""
    found: list[tuple[bytes, Version]] = []

    def attempt(renew: bool) -> None:
        with _asked(address, (0, count), renew) as answer:
            size = total(answer) or 0
            version = Version(size, answer.getheader("ETag") or "", answer.getheader("Last-Modified") or "")
            if size or answer.status != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                check_range(address, answer, (0, min(count, size)), version)
            found.append((_read(answer, min(count, size)), version))

    _persist(address, attempt)
    return found[-1]


def fetch_whole(address: Address, limit: int, too_long: type[CheckpointError] = CheckpointError) -> bytes:
    """A whole file of at most `limit` bytes; `too_long` is raised for a longer one, else errors as in :func:`fetch`."""
    found: list[bytes] = []

    def attempt(renew: bool) -> None:
        with _asked(address, None, renew) as answer:
            if answer.status != HTTPStatus.OK:
                raise refused(address, answer)
            length = answer.length  # None if the host does not say
            raw = answer.read(limit + 1) if length is None or length <= limit else b""
            if max(len(raw), length or 0) > limit:
                size = f"{length or f'more than {limit}'} bytes"
                raise too_long(
                    "the file is too long", file=address.shown, expected=f"at most {limit} bytes", found=size
                )
            if length not in (None, len(raw)):
                raise _PassingError(f"an answer cut short after {len(raw)} of {length} bytes")
            found.append(raw)

    _persist(address, attempt)
    return found[-1]


def _persist(
    address: Address,
    attempt: Callable[[bool], None],
    progress: Callable[[], int] = lambda: 0,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Attempt something until it is done, or has brought nothing for as long as there is patience."""
    most, begun, had, tries, renew = patience(), time.monotonic(), 0, 0, False
    while True:
        raise_pending()
        if stopped():
            raise InterruptedError("the run was given up")
        try:
            return attempt(renew)
        except _RenewError as refusal:
            _moved.pop(address, None)
            if renew:
                raise refusal.error from None
            renew = True
        except (_PassingError, OSError, http.client.HTTPException) as error:
            if isinstance(error, InterruptedError):
                raise
            now, came = time.monotonic(), progress()
            if came > had:
                begun, had, tries = now, came, 0
            tries += 1
            wait = min(max(0.1 * 2**tries * random.uniform(0.5, 1), getattr(error, "wait", 0.0)), 8.0)
            if isinstance(error, ssl.SSLCertVerificationError) or now + wait - begun > most:
                raise _lost(address, error, most) from None
            _sleep(wait, stopped)


def _sleep(seconds: float, stopped: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not stopped():
        raise_pending()
        time.sleep(min(left, 0.1))


class _RenewError(Exception):
    """A refusal that may be due to a signature or a redirect that has expired."""

    def __init__(self, error: CheckpointError) -> None:
        self.error = error
        super().__init__()


@contextmanager
def _asked(address: Address, span: tuple[int, int] | None, renew: bool) -> Iterator[Answer]:
    """The answer to a request for a range, or for all: any that no redirect, retry or renewal mends."""
    known = None if renew else _moved.get(address)
    begin = url, headers = known or address.request(renew)
    for _ in range(_REDIRECTS + 1):
        with _answer(url, headers, span) as answer:
            if answer.status in _PASSING:
                after = answer.getheader("Retry-After") or ""
                raise _PassingError(status(answer), float(after) if after.isdecimal() else 0.0)
            if answer.status in _REFUSED:
                raise _RenewError(refused(address, answer))
            if answer.status not in _MOVED:
                if (url, headers) != begin:
                    _moved[address] = url, headers
                yield answer
                return
            location = urljoin(url, answer.getheader("Location") or "")
            answer.read(_CHUNK)
        old, new = urlsplit(url), urlsplit(location)
        if new.scheme not in ("http", "https") or (old.scheme, new.scheme) == ("https", "http"):
            raise CheckpointError(
                "the host redirects to where nothing is fetched from",
                file=address.shown,
                expected=f"a redirect to {old.scheme}",
                found=new.scheme or "no scheme",
                hint="name the URL that it lies at in the end",
            )
        if (new.scheme, new.netloc) != (old.scheme, old.netloc):
            headers = {}
        url = location
    raise CheckpointError(
        "the host redirects again and again",
        file=address.shown,
        expected=f"{_REDIRECTS} redirects at most",
        found="more",
        hint="name the URL that it lies at in the end",
    )


@contextmanager
def _answer(url: str, headers: dict[str, str], span: tuple[int, int] | None) -> Iterator[Answer]:
    """The answer to one request. Its connection is kept for the next one if it is read to its end."""
    parts = urlsplit(url)
    proxy = _proxy(parts.scheme, parts.hostname or "")
    target = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
    if proxy is not None and parts.scheme == "http":
        target = url
    asked = {"Accept-Encoding": "identity", "User-Agent": "ckptdiff", **headers}
    if span is not None:
        asked["Range"] = f"bytes={span[0]}-{span[1] - 1}"
    connection = _kept.connections.pop(url_host := (parts.scheme, parts.netloc), None)
    used = connection is not None
    connection = connection or _connect(*url_host, proxy)
    try:
        try:
            connection.request("GET", target, headers=asked)
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException):
            if not used:
                raise
            # One that was kept may have been closed by the host meanwhile.
            connection.close()
            connection.request("GET", target, headers=asked)
            answer = connection.getresponse()
        yield answer
    except BaseException:
        connection.close()
        raise
    if answer.isclosed() and not answer.will_close:
        _kept.connections[url_host] = connection
    else:
        connection.close()


def _connect(scheme: str, host: str, proxy: str | None) -> http.client.HTTPConnection:
    at = host if proxy is None else urlsplit(proxy if "://" in proxy else f"http://{proxy}").netloc
    place = at.rpartition("@")[2]
    if scheme == "http":
        return http.client.HTTPConnection(place, timeout=_TIMEOUT)
    connection = http.client.HTTPSConnection(place, timeout=_TIMEOUT, context=_tls())
    if proxy is not None:
        connection.set_tunnel(host)
    return connection


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _proxy(scheme: str, host: str) -> str | None:
    proxy = getproxies().get(scheme)
    return None if proxy is None or proxy_bypass(host) else proxy


def _read(answer: Answer, count: int) -> bytes:
    raw = answer.read(count)
    if len(raw) != count:
        raise _PassingError(f"an answer cut short after {len(raw)} of {count} bytes")
    return raw


def _lost(address: Address, error: Any, most: float) -> CheckpointError:
    if isinstance(error, _PassingError):
        found = error.found
    elif isinstance(error, socket.gaierror):
        found = "the name of the host is not known"
    elif isinstance(error, TimeoutError):
        found = f"no byte within {_TIMEOUT:g} seconds"
    elif isinstance(error, OSError):
        found = getattr(error, "verify_message", None) or error.strerror or type(error).__name__
    else:
        found = type(error).__name__
    return CheckpointError(
        "the file cannot be fetched" if most == 0 else f"the file cannot be fetched, tried again for {most:g} seconds",
        file=address.shown,
        expected="an answer",
        found=found,
        hint="look at the network and the host, then run again; CKPTDIFF_RETRY_SECONDS sets how long it is tried",
    )
