"""Write entries, bytes under a key, to a file that gets its name when it is whole, and read them back checked.

The file is 8 magic bytes, the length of an index and its hash, the index as JSON, then the entries without a gap. The
index has the key, the length and the hash of each, and a hash of what all of them belong to. It stands alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TEMPORARY = ".tmp"
"""Suffix of a file that is not whole."""
_MAGIC = b"ckptdone"
_HEAD = struct.Struct("<8sI16s")


class EntryPlace(NamedTuple):
    """Where an entry is."""

    path: Path
    offset: int
    length: int
    digest: bytes


def write_entries(path: Path, of: str, entries: Sequence[tuple[str, Sequence[bytes]]]) -> None:
    """Write entries, each a key and the parts of its bytes, to a new file; raises as the system does."""
    described = [(key, sum(map(len, parts)), digest_of(parts).hex()) for key, parts in entries]
    index = json.dumps({"of": of, "entries": described}).encode()
    temporary = path.with_suffix(TEMPORARY)
    with temporary.open("xb") as file:
        file.write(_HEAD.pack(_MAGIC, len(index), digest_of([index])) + index)
        for _, parts in entries:
            file.writelines(parts)
    temporary.rename(path)


def places_of(path: Path, of: str) -> dict[str, EntryPlace]:
    """Where the entries of a file are, by key.

    Raises ValueError, in a word or two, if the file is not whole or belongs to something else, and OSError.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_HEAD.size)
        magic, length, digest = _HEAD.unpack(head) if len(head) == _HEAD.size else (b"", 0, b"")
        index = file.read(length) if magic == _MAGIC and length <= size else b""
        if magic != _MAGIC or digest_of([index]) != digest:
            raise ValueError("damaged")
    found: dict[str, Any] = json.loads(index)
    if found["of"] != of:
        raise ValueError("of another run")
    places, offset = {}, _HEAD.size + length
    for key, nbytes, hexadecimal in found["entries"]:
        places[key] = EntryPlace(path, offset, nbytes, bytes.fromhex(hexadecimal))
        offset += nbytes
    if size != offset:
        raise ValueError("cut short")
    return places


def read_entry(place: EntryPlace) -> bytes | None:
    """The bytes of an entry, None if they are not what was written; raises as the system does."""
    with place.path.open("rb") as file:
        file.seek(place.offset)
        found = file.read(place.length)
    return found if digest_of([found]) == place.digest else None


def digest_of(parts: Iterable[bytes]) -> bytes:
    """Hash of bytes in parts, 16 bytes long."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()
