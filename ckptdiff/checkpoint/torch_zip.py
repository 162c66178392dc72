"""Read the directory of a zip archive that torch.save wrote: where its pickle and its storages lie.

Storages are stored as they are, so that a tensor is a place in the file. An archive may be a part of a larger file, as
those of torch.distributed.checkpoint are.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

from ckptdiff.checkpoint.regular_file import open_regular, read_bytes
from ckptdiff.checkpoint.unpickle import unpickle
from ckptdiff.errors import HeaderError

__all__ = ["MAX_PICKLE_BYTES", "Record", "TorchZip", "is_zip", "open_zip"]

MAX_PICKLE_BYTES = 1 << 29
"""The longest pickle or directory that is read."""

_LOCAL = struct.Struct("<4s22xHH")
"""The header before each record: signature, and lengths of the name and of what else follows."""
_SIGNATURE = b"PK\x03\x04"
_ENCRYPTED = 1
_SAVE_AGAIN = "load it with torch, and save it again with torch.save"


@dataclass(frozen=True, slots=True)
class Record:
    """The bytes of one record: absolute offset in the file, and how many."""

    start: int
    size: int


@dataclass(frozen=True, slots=True)
class TorchZip:
    """What an archive holds.

    Attributes
    ----------
    content : object
        Of its pickle, as :func:`~ckptdiff.checkpoint.unpickle.unpickle` gives it.
    storages : mapping of str to Record
        By their keys.
    digest : str
        SHA-256 of its directory, which holds a CRC-32 of each record, and of its pickle, in hexadecimal.
    """

    content: object
    storages: Mapping[str, Record]
    digest: str


class _Part(io.RawIOBase):
    """A part of an open file, as a file of its own."""

    def __init__(self, descriptor: int, start: int, size: int, path: str) -> None:
        self._descriptor, self._start, self._size, self._path = descriptor, start, size, path
        self._at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + (0, self._at, self._size)[whence]
        if at < 0:
            raise OSError("before the beginning")
        self._at = at
        return at

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._size - self._at, 0)
        count = left if size is None or size < 0 else min(size, left)
        if count > MAX_PICKLE_BYTES:
            raise zipfile.BadZipFile(f"a directory of {count} bytes")
        found = read_bytes(self._descriptor, count, self._start + self._at, self._path)
        self._at += count
        return found


def is_zip(path: str) -> bool:
    """Whether a regular file begins as an archive does, and is not called safetensors. Raises CheckpointError."""
    if path.endswith(".safetensors"):
        return False
    with open_regular(path) as (descriptor, status):
        return read_bytes(descriptor, min(status.st_size, len(_SIGNATURE)), 0, path) == _SIGNATURE


def open_zip(descriptor: int, start: int, size: int, file: str, tensor: str | None = None) -> TorchZip:
    """Read an archive's directory and pickle, and check where its records lie.

    Parameters
    ----------
    descriptor : int
        Of an open file.
    start, size : int
        Where the archive lies in it.
    file : str
        Its path, for messages.
    tensor : str, optional
        What the archive stores, for messages.

    Raises
    ------
    HeaderError
        No zip archive, a truncated one, one that torch.save did not write, on a machine of another byte order, or whose
        records are compressed, overlap or are given twice; a pickle that cannot be read.
    """

    def refuse(problem: str, expected: str, found: str, hint: str | None = None) -> HeaderError:
        return HeaderError(problem, file=file, tensor=tensor, expected=expected, found=found, hint=hint)

    part = _Part(descriptor, start, size, file)
    try:
        # It reads the directory alone; zip64 is what torch writes.
        archive = zipfile.ZipFile(part)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
        raise refuse(
            "the file is truncated, or no zip archive",
            f"a zip archive of {size} bytes, with its directory at the end",
            str(error),
            "the download or copy may be incomplete: fetch it again",
        ) from None
    records: dict[str, Record] = {}
    end, previous = 0, "the beginning"
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        name = info.filename
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise refuse("a record of the archive is compressed", "records that are stored", ascii(name), _SAVE_AGAIN)
        if info.flag_bits & _ENCRYPTED:
            raise refuse("a record of the archive is encrypted", "records that are stored", ascii(name), _SAVE_AGAIN)
        begin = info.header_offset
        if not records and begin:
            raise refuse("there are bytes before the archive", "a record at byte 0", f"{name!a} at {begin}")
        if name in records or not end <= begin <= archive.start_dir - _LOCAL.size:
            raise refuse(
                "two records of the archive overlap, or are one",
                f"a record that begins at {end} or after it, where {previous} ends, and before {archive.start_dir}",
                f"{name!a} at {begin}",
                _SAVE_AGAIN,
            )
        signature, *lengths = _LOCAL.unpack(read_bytes(descriptor, _LOCAL.size, start + begin, file))
        end, previous = begin + _LOCAL.size + sum(lengths) + info.file_size, ascii(name)
        if signature != _SIGNATURE or end > archive.start_dir:
            raise refuse(
                "a record of the archive does not lie where its directory says",
                f"{name!a} of {info.file_size} bytes at {begin}, before the directory at {archive.start_dir}",
                f"signature {signature!r}, and an end at {end}",
                "the download or copy may be damaged: fetch it again",
            )
        records[name] = Record(start + end - info.file_size, info.file_size)
    pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise refuse("a zip archive that torch.save did not write", "one record */data.pkl", f"{len(pickles)} of them")
    folder = pickles[0].removesuffix("data.pkl")
    order = records.get(folder + "byteorder")
    said = b"little" if order is None else read_bytes(descriptor, min(order.size, 20), order.start, file)
    if said != b"little":
        raise refuse(
            "the file was not written on a machine that stores the low byte first",
            "byteorder little",
            ascii(said.decode(errors="replace")),
            "on a little-endian machine, " + _SAVE_AGAIN,
        )
    pickle = records[pickles[0]]
    if max(pickle.size, size - archive.start_dir) > MAX_PICKLE_BYTES:
        raise refuse("the pickle or the directory is too long", f"at most {MAX_PICKLE_BYTES} bytes", f"{pickle.size}")
    raw = read_bytes(descriptor, pickle.size, pickle.start, file)
    directory = read_bytes(descriptor, size - archive.start_dir, start + archive.start_dir, file)
    digest = hashlib.sha256(directory + raw).hexdigest()
    storages = {name.removeprefix(folder + "data/"): record for name, record in records.items()}
    return TorchZip(unpickle(raw, file), storages, digest)
