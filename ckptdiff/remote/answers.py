"""Say what an answer to a request for a range has to be, and what is wrong with one that is not."""

from __future__ import annotations

import http.client
import re
from http import HTTPStatus
from typing import TypeAlias

from ckptdiff.errors import ChangedFileError, CheckpointError
from ckptdiff.remote.address import Address
from ckptdiff.remote.hub import GATED
from ckptdiff.remote.remote_file import Version

__all__ = ["Answer", "check_range", "refused", "status", "total"]

Answer: TypeAlias = http.client.HTTPResponse

_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")
_HINTS = {
    401: "give credentials: the documentation says where they are looked for",
    403: "check that these credentials may read it, and that the URL has not expired",
    404: "check the name",
}
_RANGES = "a host that answers requests for ranges (HTTP 206), or a copy on disk"


def total(answer: Answer) -> int | None:
    """Bytes of the whole file, if the answer to a range says so."""
    match = _CONTENT_RANGE.fullmatch((answer.getheader("Content-Range") or "").strip())
    return int(match[3]) if match else None


def check_range(address: Address, answer: Answer, span: tuple[int, int], version: Version) -> None:
    """Make sure that an answer is the range that was asked for, of the file as it was at first."""
    if answer.status == HTTPStatus.OK:
        raise CheckpointError(
            "the host answers with the whole file in place of a range of it",
            file=address.shown,
            expected="206 Partial Content",
            found=status(answer),
            hint=f"name {_RANGES}",
        )
    changed = total(answer) not in (None, version.size)
    if answer.status != HTTPStatus.PARTIAL_CONTENT and not changed:
        raise refused(address, answer)
    given, modified = answer.getheader("ETag") or "", answer.getheader("Last-Modified") or ""
    if changed or given != version.etag or (not given and modified != version.modified):
        raise ChangedFileError(
            "the file was replaced while it was read",
            file=address.shown,
            expected=f"{version.size} bytes, ETag {version.etag or 'none'}",
            found=f"{total(answer)} bytes, ETag {given or 'none'}",
            hint="compare a copy that nothing writes to",
        )
    expected = f"bytes {span[0]}-{span[1] - 1}/{version.size}"
    found, length = answer.getheader("Content-Range"), answer.getheader("Content-Length")
    if found != expected or (length is not None and length != str(span[1] - span[0])):
        raise CheckpointError(
            "the host answers with another range than was asked for",
            file=address.shown,
            expected=f"{expected}, {span[1] - span[0]} bytes",
            found=f"{found or 'no range'}, {length} bytes",
            hint=f"name {_RANGES}",
        )
    if (answer.getheader("Content-Encoding") or "identity") != "identity":
        raise CheckpointError(
            "the host answers with compressed bytes",
            file=address.shown,
            expected="Content-Encoding: identity",
            found=answer.getheader("Content-Encoding"),
            hint=f"name {_RANGES}",
        )


def refused(address: Address, answer: Answer) -> CheckpointError:
    """The error for an answer that is none of those that bring bytes; caused by FileNotFoundError for 404."""
    problem = "no such file" if answer.status == HTTPStatus.NOT_FOUND else "the host refuses the file"
    hint = _HINTS.get(answer.status, f"look at what the host says of this URL, or name {_RANGES}")
    if answer.getheader("X-Error-Code") == "GatedRepo":  # the hub, which tells anybody what such a model holds
        problem, hint = GATED
    expected, found = "206 Partial Content", status(answer)
    error = CheckpointError(problem, file=address.shown, expected=expected, found=found, hint=hint)
    if answer.status == HTTPStatus.NOT_FOUND:
        error.__cause__ = FileNotFoundError(address.shown)
    return error


def status(answer: Answer) -> str:
    """Spell a status as messages have it: "HTTP 404 Not Found"."""
    # The phrase is the library's, not the host's, which may say anything.
    phrase = HTTPStatus(answer.status).phrase if answer.status in set(HTTPStatus) else ""
    return f"HTTP {answer.status} {phrase}".rstrip()
