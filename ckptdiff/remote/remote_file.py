"""Say which version of which remote file is meant."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

from ckptdiff.remote.address import Address

__all__ = ["RemoteFile", "Version", "number_of"]


@dataclass(frozen=True, slots=True)
class Version:
    """What tells one version of a file from the next.

    Attributes
    ----------
    size : int
        Bytes of the whole file.
    etag, modified : str
        As its host gave them; empty if it gave none.
    """

    size: int
    etag: str
    modified: str


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file elsewhere, as it was when its header was read."""

    address: Address
    version: Version
    content: str = ""
    """A hash of its bytes, by the word of its host; empty if it gives none."""

    @property
    def identity(self) -> int:
        """A number of 60 bits that tells it from other files: those of equal content, or version, have the same."""
        return number_of(self.content or f"{self.address.shown} {self.version}")


@lru_cache(maxsize=4096)
def number_of(text: str) -> int:
    """A number of 60 bits that stands for a text."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)
