"""Say where a remote file is: what is asked for, and what may be shown of it.

URLs carry secrets: a password before the host, a signature or a token behind the path. No message, log or file gets
more than :func:`shown` leaves of one.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

from ckptdiff.errors import CheckpointError

__all__ = ["Address", "Url", "is_url", "shown", "without_secrets"]

SCHEMES = ("http", "https", "s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "hf")
"""Schemes that name checkpoints elsewhere."""
_IN_TEXT = re.compile(r"https?://(?:[^\s'\"<>/?]*@[^\s'\"<>]*|[^\s'\"<>?]*\?(?!\.\.\.[0-9a-f]{8})[^\s'\"<>]*)")
"""A URL with a user or a query, but for one that is shown already."""
_URL = re.compile(rf"({'|'.join(SCHEMES)})://", re.IGNORECASE)


class Address(Protocol):
    """Where one remote file is; equal ones are the same place, and they can be sent to another process."""

    def __hash__(self) -> int: ...

    @property
    def shown(self) -> str:
        """Its name in messages and run files, without secrets. Different addresses have different ones."""

    def request(self, renew: bool) -> tuple[str, dict[str, str]]:
        """The http or https URL to ask at, and headers for its host alone; anew if an earlier one was refused.

        Raises CheckpointError if there is none, for want of credentials for example.
        """

    def beside(self, name: str) -> Address:
        """The address of another file in the same folder."""


@dataclass(frozen=True, slots=True)
class Url:
    """A plain http or https URL; a user and a password in it go into a header."""

    url: str = field(repr=False)

    @property
    def shown(self) -> str:
        """The URL without user, password and query."""
        return shown(self.url)

    def request(self, renew: bool) -> tuple[str, dict[str, str]]:
        """The URL without user and password, and these as HTTP's basic authorization."""
        parts = _split(self.url)
        headers = {}
        if parts.username is not None:
            both = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers["Authorization"] = "Basic " + base64.b64encode(both.encode()).decode()
        bare = parts._replace(netloc=_host(parts), path=quote(parts.path or "/", safe="/%:@!$&'()*+,;=~"), fragment="")
        return urlunsplit(bare), headers

    def beside(self, name: str) -> Url:
        """Another file in the folder of this one; what stands behind the path stays."""
        parts = _split(self.url)
        return Url(urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{quote(name)}")))


def is_url(path: str) -> bool:
    """Whether a path names something elsewhere."""
    return _URL.match(path) is not None


def shown(url: str) -> str:
    """What may be shown of a URL: no user, no password; a query is told from others by eight digits of its hash."""
    parts = _split(url)
    query = f"...{hashlib.sha256(parts.query.encode()).hexdigest()[:8]}" if parts.query else ""
    host = _host(parts) if parts.scheme.lower() in ("http", "https") else parts.netloc
    return urlunsplit(parts._replace(netloc=host, query=query, fragment=""))


def without_secrets(text: str) -> str:
    """A text in which of every URL only that is left which may be shown."""
    return _IN_TEXT.sub(_cleared, text)


def _cleared(found: re.Match[str]) -> str:
    try:
        return shown(found[0])
    except CheckpointError:
        return "a URL that is none"


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        # What cannot be taken apart cannot be cleared of secrets either.
        raise CheckpointError("not a possible URL", found=str(error).partition(":")[0]) from None
    return parts


def _host(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2]
