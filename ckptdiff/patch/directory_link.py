"""Read a directory of deltas, as ``make_directory.py`` and the trainers with the same convention write it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ckptdiff.checkpoint import TensorInfo, read_header
from ckptdiff.checkpoint.index import MAX_INDEX_BYTES
from ckptdiff.checkpoint.regular_file import open_regular, read_bytes, read_whole
from ckptdiff.checkpoint.strict_json import JsonProblemError, parse_object
from ckptdiff.errors import CheckpointError, PatchError
from ckptdiff.patch.contents import TensorRow
from ckptdiff.patch.delta import BLOCK_CODES, TensorDelta
from ckptdiff.patch.digests import CHECKSUMS, required
from ckptdiff.patch.directory_making import INDEX_NAME
from ckptdiff.patch.link import FETCH_AGAIN, Apply, GivenSide, StreamLink, scattered
from ckptdiff.patch.make_directory import ENCODINGS
from ckptdiff.patch.small_frames import LEAST_WINDOW, xor_small

__all__ = ["DeltaFolder", "link_of_folder", "read_folder", "rows_of"]

_DIGITS = {"xxh3-128": 32, "blake3": 64, "adler32": 8}
_FRAME_HEADER = 18
"""Bytes that the header of a zstd frame takes at most."""
_SMALL = 1 << 16
_UNKNOWN = (1 << 64) - 1
_MOST_WINDOW = 1 << 27
"""Bytes that a frame may ask zstd to keep at most."""


@dataclass(frozen=True, slots=True)
class DeltaFolder:
    """What the index and the headers of a directory of deltas say.

    Attributes
    ----------
    path : str
    identity : str
        SHA-256 of index and headers.
    version, base_version : int
    encoding, checksum : str
    frames : mapping of str to TensorInfo
        Where the frame of each changed tensor lies.
    digests : mapping of str to str
        Of its new bytes.
    size : int
        Bytes of all files.
    """

    path: str
    identity: str
    version: int
    base_version: int
    encoding: str
    checksum: str
    frames: Mapping[str, TensorInfo]
    digests: Mapping[str, str]
    size: int


def read_folder(path: str | os.PathLike[str]) -> DeltaFolder:
    """Read index and headers of a directory of deltas.

    Raises
    ------
    PatchError
        It is none, or its parts do not belong together.
    CheckpointError
        A file cannot be read.
    """
    folder = Path(path)
    raw = read_whole(str(folder / INDEX_NAME), MAX_INDEX_BYTES)
    try:
        index = parse_object(raw)
    except JsonProblemError as error:
        raise _wrong(folder, f"the index of the patch {error.problem}", error.expected, error.found) from error
    facts, weight_map = index.get("metadata"), index.get("weight_map")
    if not isinstance(facts, dict) or not isinstance(weight_map, dict) or "delta_encoding" not in facts:
        raise _wrong(folder, "not a patch", "metadata with delta_encoding, and a weight_map", "a checkpoint's index")
    for key, known in (
        ("delta_encoding", ENCODINGS),
        ("checksum_format", CHECKSUMS),
        ("compression_format", ("zstd",)),
    ):
        if facts.get(key) not in known:
            raise _wrong(folder, f"unknown {key}", " or ".join(known), facts.get(key))
    versions = []
    for key in ("version", "base_version"):
        if not re.fullmatch("[0-9]{1,18}", str(facts.get(key))):
            raise _wrong(folder, f"no {key}", "a whole number", facts.get(key))
        versions.append(int(facts[key]))
    of_file: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or (file not in of_file and not _is_inside(file)):
            raise _wrong(folder, "the index names a file outside its folder", "a file name", repr(file), name)
        of_file.setdefault(file, set()).add(name)
    seal, size = hashlib.sha256(raw), len(raw)
    frames: dict[str, TensorInfo] = {}
    digests: dict[str, str] = {}
    digits = re.compile(f"[0-9a-f]{{{_DIGITS[facts['checksum_format']]}}}")
    for file, names in sorted(of_file.items()):
        shard, tensors = read_header(folder / file)
        seal.update(shard.header_sha256.encode())
        size += shard.size
        if {one.name for one in tensors} != names:
            strange = min({one.name for one in tensors} ^ names)
            raise _wrong(folder / file, "index and file name different tensors", "the same", "one of both", strange)
        for one in tensors:
            digest = shard.metadata.get(one.name, "")
            if one.dtype != "U8" or len(one.shape) != 1:
                raise _wrong(
                    folder / file, "not a frame", "U8 of one dimension", f"{one.dtype} {list(one.shape)}", one.name
                )
            if not digits.fullmatch(digest):
                raise _wrong(
                    folder / file, "no digest", f"{facts['checksum_format']} in the metadata", digest, one.name
                )
            frames[one.name] = one
            digests[one.name] = digest
    return DeltaFolder(
        path=str(folder),
        identity=seal.hexdigest(),
        version=versions[0],
        base_version=versions[1],
        encoding=facts["delta_encoding"],
        checksum=facts["checksum_format"],
        frames=frames,
        digests=digests,
        size=size,
    )


def _is_inside(file: str) -> bool:
    """Whether a name is that of a file in the same folder."""
    return Path(file).name == file and file not in (".", "..") and "\\" not in file and "\0" not in file


@contextmanager
def link_of_folder(path: str | os.PathLike[str], base: GivenSide, before: Sequence[StreamLink]) -> Iterator[StreamLink]:
    """Open a directory of deltas as a link of a chain that begins with a base, behind those before it.

    Raises
    ------
    PatchError
        As :func:`read_folder`; or it names a tensor that the base lacks, or follows another version.
    """
    required("zstandard")
    folder = read_folder(path)
    if before:
        last = read_folder(before[-1].path)
        if folder.base_version != last.version:
            raise PatchError(
                "the patch does not follow the one before it",
                file=folder.path,
                expected=f"a patch of version {last.version}, which {last.path} makes",
                found=f"one of version {folder.base_version}",
                hint="give the patches in the order of their versions",
            )
    for name in folder.frames:
        if name not in base.tensors:
            raise PatchError(
                "the base is not the one that the patch was made for",
                file=folder.path,
                tensor=name,
                expected=f"a tensor of {base.path}",
                found="no such tensor",
            )
    known = {name: one.after for name, one in before[-1].delta.tensors.items()} if before else {}
    prefix = "" if folder.checksum == CHECKSUMS[0] else f"{folder.checksum}:"
    made = {name: prefix + digest for name, digest in folder.digests.items()}
    with ExitStack() as stack:
        shards = {one.shard.path: one.shard for one in folder.frames.values()}
        opened = {file: stack.enter_context(open_regular(file))[0] for file in sorted(shards)}
        begin = {name: _begin(folder, one, opened[one.shard.path]) for name, one in folder.frames.items()}
        digests = {name: (None, made.get(name, known.get(name))) for name in base.tensors}
        repeatable = folder.encoding == "overwrite"
        small = None if repeatable else xor_small(folder.frames, opened)
        yield StreamLink(folder.path, folder.identity, base, digests, begin, repeatable, small)
        for file, shard in shards.items():
            now = os.fstat(opened[file])
            if (now.st_size, now.st_mtime_ns) != (shard.size, shard.mtime_ns):
                raise CheckpointError("the patch changed while it was read", file=file)


def _begin(folder: DeltaFolder, frame: TensorInfo, descriptor: int) -> Callable[[TensorDelta], Iterator[Apply]]:
    read = _xor if folder.encoding == "xor" else _overwrite
    return lambda tensor: read(tensor, frame, descriptor)


def _xor(tensor: TensorDelta, frame: TensorInfo, descriptor: int) -> Iterator[Apply]:
    stream = _Frame(frame, descriptor, tensor.nbytes)
    stream.require(tensor.nbytes)
    block = BLOCK_CODES * tensor.coding.width
    for start in range(0, tensor.nbytes, block):
        apart = stream.numbers(min(block, tensor.nbytes - start), "u1")
        if start + block >= tensor.nbytes:
            stream.end()
        yield lambda codes, apart=apart: np.bitwise_xor(codes, apart, out=codes)  # type: ignore[misc]


def _overwrite(tensor: TensorDelta, frame: TensorInfo, descriptor: int) -> Iterator[Apply]:
    # Values lie behind all positions, so the frame is read twice at a time.
    positions, values = (_Frame(frame, descriptor, 4 + 5 * tensor.nbytes) for _ in range(2))
    count = int(positions.numbers(1, "<u4")[0])
    if count > tensor.nbytes:
        raise positions.wrong("more bytes change than the tensor has", f"at most {tensor.nbytes}", count)
    positions.require(4 + 5 * count)
    values.skip(4 + 4 * count)
    block, left = BLOCK_CODES * tensor.coding.width, count
    for at, new in scattered(
        lambda some: positions.numbers(some, "<u4"),
        lambda some: values.numbers(some, "u1"),
        count,
        tensor.nbytes,
        block,
        lambda expected, found: positions.wrong("a position of the patch cannot be", expected, found),
    ):
        left -= at.size
        if not left:
            values.end()
        yield lambda codes, at=at, new=new: codes.__setitem__(at, new)  # type: ignore[misc]


@cache
def _zstandard() -> Any:
    """The module; to look it up each time would cost as much as a small frame."""
    return required("zstandard")


class _Frame:
    """One zstd frame, read piece by piece; what it holds is not believed before it is there."""

    def __init__(self, frame: TensorInfo, descriptor: int, most: int) -> None:
        zstandard = _zstandard()
        self._frame, self._descriptor, self._at = frame, descriptor, frame.start
        self._error, self._parameters = zstandard.ZstdError, zstandard.get_frame_parameters
        # A small frame is read at once.
        held = self.read(frame.nbytes) if frame.nbytes <= _SMALL else None
        try:
            self.size = self._said(held)
            window = min(max(2 * most, LEAST_WINDOW), _MOST_WINDOW)
            self._stream = zstandard.ZstdDecompressor(max_window_size=window).stream_reader(held or self)
        except self._error as error:
            raise self.wrong("a frame of the patch is damaged", "a zstd frame", error) from error

    def read(self, size: int) -> bytes:
        """The next bytes as they are stored: the source of the stream."""
        size = min(size, self._frame.stop - self._at)
        self._at += size
        return read_bytes(self._descriptor, size, self._at - size, self._frame.shard.path)

    def _said(self, held: bytes | None) -> int | None:
        """How many bytes the frame says it holds, if it says so."""
        frame = self._frame
        if held is None:
            held = read_bytes(self._descriptor, _FRAME_HEADER, frame.start, frame.shard.path)
        size: int = self._parameters(held[:_FRAME_HEADER]).content_size
        return None if size == _UNKNOWN else size

    def count(self) -> tuple[int, int]:
        """Read to the end, and count the bytes, and those that are not zero."""
        size = total = 0
        try:
            while data := self._stream.read(1 << 20):
                size += len(data)
                total += int(np.count_nonzero(np.frombuffer(data, np.uint8)))
        except self._error as error:
            raise self.wrong("a frame of the patch is damaged", "a zstd frame", error) from error
        return size, total

    def require(self, size: int) -> None:
        """The frame may say how much it holds."""
        if self.size not in (size, None):
            raise self.wrong("a frame of the patch has another size than its tensor", f"{size} bytes", self.size)

    def numbers(self, count: int, kind: str) -> Any:
        """The next so many numbers."""
        size = count * np.dtype(kind).itemsize
        try:
            data = self._stream.read(size)
        except self._error as error:
            raise self.wrong("a frame of the patch is damaged", "a zstd frame", error) from error
        if len(data) != size:
            raise self.wrong("a frame of the patch is cut short", f"{size} bytes more", len(data))
        return np.frombuffer(data, kind)

    def skip(self, size: int) -> None:
        """Read so many bytes and forget them."""
        for start in range(0, size, 1 << 20):
            self.numbers(min(1 << 20, size - start), "u1")

    def end(self) -> None:
        """Nothing may follow."""
        try:
            more = self._stream.read(1)
        except self._error as error:
            raise self.wrong("a frame of the patch is damaged", "its end", error) from error
        if more:
            raise self.wrong("a frame of the patch has another size than its tensor", "its end", "more bytes")

    def wrong(self, problem: str, expected: object, found: object) -> PatchError:
        """An error that names the tensor."""
        return _wrong(Path(self._frame.shard.path), problem, expected, found, self._frame.name)


def rows_of(folder: DeltaFolder) -> list[TensorRow]:
    """How many bytes of each tensor change, for which all of a directory is read; values are bytes here.

    An `overwrite` directory does not say how many a tensor has.

    Raises
    ------
    PatchError
        A frame is damaged.
    """
    rows = []
    for name, one in folder.frames.items():
        with open_regular(one.shard.path) as (descriptor, _):
            frame = _Frame(one, descriptor, _MOST_WINDOW)
            if folder.encoding == "overwrite":
                size, changed = 0, int(frame.numbers(1, "<u4")[0])
            else:
                size, changed = frame.count()
            rows.append(TensorRow(name, (), size, changed, one.nbytes))
    return rows


def _wrong(file: Path, problem: str, expected: object, found: object, tensor: str | None = None) -> PatchError:
    return PatchError(problem, file=file, tensor=tensor, expected=expected, found=found, hint=FETCH_AGAIN)
