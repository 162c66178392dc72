"""Reach files of S3, Google Cloud Storage and Azure: obstore signs, lists and uploads, and the transport fetches.

A signed URL carries no header that a redirect could take elsewhere, and its answers are checked like all others.
Credentials and endpoints come from where obstore looks: environment variables such as ``AWS_ACCESS_KEY_ID``, or the
machine's own role.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from ckptdiff.errors import CheckpointError, RunFileError
from ckptdiff.remote.address import shown, without_secrets
from ckptdiff.remote.transport import patience

__all__ = ["BucketObject", "is_object", "list_folder", "upload"]

OBJECT_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")
_VALID = 3600
"""Seconds for which a URL is signed; it is signed anew in the last quarter, and where it is refused."""
_HINTS = {
    "s": "look at the name; credentials, region and endpoint come from the environment: AWS_ACCESS_KEY_ID,"
    " AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL",
    "g": "look at the name; credentials come from the environment, GOOGLE_SERVICE_ACCOUNT, and have to be able to sign",
    "a": "look at the name; credentials come from the environment: AZURE_STORAGE_ACCOUNT_NAME and"
    " AZURE_STORAGE_ACCOUNT_KEY",
}
"""By the first letter of a scheme."""
_ENVIRONMENT = ("AWS_", "GOOGLE_", "AZURE_", "CKPTDIFF_RETRY_SECONDS")
"""How variables begin that say who asks, where, and for how long."""
_Environment: TypeAlias = frozenset[tuple[str, str]]
_lock = threading.Lock()
_signed: dict[tuple[str, _Environment], tuple[str, float]] = {}


@dataclass(frozen=True, slots=True)
class BucketObject:
    """An object of a bucket, by its URL."""

    url: str

    @property
    def shown(self) -> str:
        """The URL, which holds no secret; what stands behind ``?`` or ``#`` is not part of it."""
        return shown(self.url)

    def request(self, renew: bool) -> tuple[str, dict[str, str]]:
        """A signed URL; none of its secrets is in a header."""
        signed = self.url, _environment()
        with _lock:
            url, until = _signed.get(signed, ("", 0.0))
            if renew or time.monotonic() > until:
                import_obstore()
                from obstore import sign

                with _told(self.shown, "cannot be signed for"):
                    url = sign(_store(_bucket(self.url)), "GET", _key(self.url), timedelta(seconds=_VALID))
                _signed[signed] = url, time.monotonic() + 0.75 * _VALID
        return url, {}

    def beside(self, name: str) -> BucketObject:
        """Another object in the same folder."""
        return BucketObject(f"{self.url.rpartition('/')[0]}/{name}")


def is_object(url: str) -> bool:
    """Whether a URL names something in an object store."""
    return urlsplit(url).scheme.lower() in OBJECT_SCHEMES


def list_folder(url: str) -> list[str]:
    """Names of the objects directly in a folder, sorted; none if there is no such folder.

    Raises
    ------
    CheckpointError
        If it cannot be listed, or obstore is missing.
    """
    import_obstore()
    from obstore import list_with_delimiter

    with _told(shown(url), "cannot be listed"):
        found = list_with_delimiter(_store(_bucket(url)), _key(url).rstrip("/") or None)
    return sorted(item["path"].rpartition("/")[2] for item in found["objects"])


def upload(file: Path, url: str) -> None:
    """Copy a local file to an object, which appears when it is complete.

    Raises
    ------
    RunFileError
        If it cannot be written; no object is left behind then.
    """
    import_obstore()
    from obstore import put

    with _told(shown(url), "cannot be written", RunFileError):
        put(_store(_bucket(url)), _key(url), file)


def import_obstore() -> None:
    """Raise CheckpointError that names the extra if obstore is missing."""
    try:
        import obstore  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            "object stores need obstore, which is not installed", hint="pip install 'ckptdiff[remote]'"
        ) from error


def _bucket(url: str) -> str:
    parts = urlsplit(url)
    scheme = "s3" if parts.scheme.lower() == "s3a" else parts.scheme.lower()
    return f"{scheme}://{parts.netloc}"


def _key(url: str) -> str:
    return urlsplit(url).path.lstrip("/")


def _store(bucket: str) -> Any:
    return _opened(bucket, _environment())


def _environment() -> _Environment:
    return frozenset(item for item in os.environ.items() if item[0].startswith(_ENVIRONMENT))


@lru_cache(maxsize=16)
def _opened(bucket: str, environment: _Environment) -> Any:
    """The store of a bucket, in an environment, which a program may change."""
    from obstore.store import from_url

    with _told(bucket, "cannot be opened"):
        return from_url(bucket, retry_config={"retry_timeout": timedelta(seconds=patience())})


@contextmanager
def _told(where: str, what: str, kind: type[CheckpointError] | type[RunFileError] = CheckpointError) -> Iterator[None]:
    """Turn errors of obstore into ours. Their texts may hold URLs, of which no query is told."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, OSError, ValueError) as error:
        found = without_secrets(str(error).partition("\n")[0])
        raise kind(f"the object {what}", file=where, found=found, hint=_HINTS[urlsplit(where).scheme[:1]]) from None
