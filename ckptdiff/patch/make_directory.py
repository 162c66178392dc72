"""Make the directory of zstd frames that slime, miles, vime and stitch write, and SGLang's ``/pull_weights`` applies.

It is one version of the weights: safetensors files that hold, of each tensor that changed, one zstd frame of type U8,
and in their metadata the digest of its new bytes; and ``model.safetensors.index.json``, which is written last. A frame
holds the new bytes xor the old ones, or how many bytes changed, where (both uint32), and what they are now.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ckptdiff.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from ckptdiff.errors import OptionError, PatchError, RunFileError
from ckptdiff.events import Listener, Stage, stage
from ckptdiff.files.staged import StagedFile, StagedFolder, sync_folder, write_whole
from ckptdiff.patch.coded_block import Coding
from ckptdiff.patch.comparing import (
    Bytes,
    Shipped,
    blocks_in,
    compared,
    pieces_of,
    require_same_tensors,
    shipped,
    spooled,
)
from ckptdiff.patch.delta import BLOCK_CODES
from ckptdiff.patch.digests import CHECKSUMS, TensorDigest, digest_of, required
from ckptdiff.patch.side_files import SideFiles
from ckptdiff.patch.spans import threads_for
from ckptdiff.runfile.check_target import check_new
from ckptdiff.runfile.safetensors_file import Entry, write_safetensors

__all__ = ["ENCODINGS", "INDEX_NAME", "OVERWRITE_LIMIT", "folder_name", "make_directory"]

ENCODINGS = ("xor", "overwrite")
INDEX_NAME = "model.safetensors.index.json"
OVERWRITE_LIMIT = 1 << 32
"""Bytes of a tensor from which uint32 positions do not reach its end."""
_VERSIONED = re.compile(r"weight_v(\d{6,})")
_MOST_VERSION = 999_999_999


def folder_name(version: int) -> str:
    """What engines look for."""
    return f"weight_v{version:06d}"


def make_directory(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    encoding: str = "xor",
    checksum: str = CHECKSUMS[0],
    version: int | None = None,
    base_version: int | None = None,
    level: int = 1,
    threads: int = 0,
    listener: Listener | None = None,
) -> Shipped:
    """Write what makes `tuned` of `base` as a directory that inference engines pull.

    Parameters
    ----------
    base, tuned : path-like
        Checkpoints with the same tensors, as `open_checkpoint` takes them.
    target : path-like
        The version's directory, to be made.
    encoding : {"xor", "overwrite"}
        The first is its own inverse; the second may be applied again.
    checksum : {"xxh3-128", "blake3", "adler32"}
        Of the bytes of each changed tensor.
    version, base_version : int, optional
        Which version it makes, and of which one. Without the first it is the number in a target named like
        ``weight_v000001``, or 1; without the second it is the one before.
    level : int
        Of zstd, from 1 to 19; above, each thread would keep hundreds of megabytes.
    threads : int
        0 stands for one per core. The result does not depend on it.
    listener : callable, optional
        Told of the stage "making the patch", in bytes.

    Returns
    -------
    Shipped

    Raises
    ------
    CheckpointError
        A side cannot be read, or changes while it is read.
    OptionError
        A module is missing, or an option makes no sense.
    PatchError
        A tensor is new, lost, retyped or reshaped, or too large for `overwrite`.
    RunFileError
        The target exists or cannot be written.

    Examples
    --------
    >>> base, tuned = "fixtures/llama/base", "fixtures/llama/tuned"
    >>> from ckptdiff import patch
    >>> made = patch.make_directory(base, tuned, "weight_v000001")
    >>> made.changed_tensors, made.files
    (30, 3)
    """
    target = Path(target)
    versions = _versions(target, version, base_version)
    for name, value, known in (("encoding", encoding, ENCODINGS), ("checksum", checksum, CHECKSUMS)):
        if value not in known:
            raise OptionError(f"no such {name}", expected=", ".join(known), found=value)
    if not 1 <= level <= 19:
        raise OptionError("zstd is used with no such level", expected="1 to 19", found=level)
    digest_of(b"", checksum)  # asks for its module
    required("zstandard")
    sides = open_checkpoint(base), open_checkpoint(tuned)
    require_same_tensors(*sides, "a directory of deltas")
    if encoding == "overwrite":
        _require_reach(sides[1])
    check_new(target)
    total = sum(tensor.nbytes for side in sides for tensor in side.tensors.values())
    with StagedFolder(target) as folder:
        with stage(listener, "making the patch", total, "bytes") as told:
            making = _Making(sides, encoding, checksum, level, threads_for(threads), told, folder.path)
            made = making.run(
                {
                    "version": f"{versions[0]:06d}",
                    "base_version": f"{versions[1]:06d}",
                    "delta_encoding": encoding,
                    "compression_format": "zstd",
                    "checksum_format": checksum,
                }
            )
        folder.commit()
    return made


def _versions(target: Path, version: int | None, base_version: int | None) -> tuple[int, int]:
    named = _VERSIONED.fullmatch(target.name)
    if version is None:
        version = int(named[1]) if named else 1
    if base_version is None:
        base_version = version - 1
    if not 0 <= base_version < version <= _MOST_VERSION:
        raise OptionError(
            "a version follows the one it is made of",
            expected=f"0 <= base version < version <= {_MOST_VERSION}",
            found=f"version {version} of version {base_version}",
        )
    return version, base_version


def _require_reach(side: Checkpoint) -> None:
    for name, tensor in side.tensors.items():
        if tensor.nbytes >= OVERWRITE_LIMIT:
            raise PatchError(
                "overwrite has 32-bit positions, which do not reach the end of this tensor",
                file=side.path,
                tensor=name,
                expected=f"fewer than {OVERWRITE_LIMIT} bytes",
                found=tensor.nbytes,
                hint="--encoding xor",
            )


class _Making:
    """One directory: frames go to a file without a name, and from there, with their header, into safetensors files."""

    def __init__(
        self,
        sides: tuple[Checkpoint, Checkpoint],
        encoding: str,
        checksum: str,
        level: int,
        threads: int,
        told: Stage,
        folder: Path,
    ) -> None:
        self._sides, self._checksum, self._told, self._folder = sides, checksum, told, folder
        self._layout = SideFiles(sides[1], Path(sides[1].path))
        self._overwrite = encoding == "overwrite"
        self._level, self._threads, self._stop = level, threads, threading.Event()
        self._compressors = threading.local()
        # Frames of large tensors are cut into jobs, whose bounds, and so the bytes, are the same with any number of
        # threads but none.
        self._parallel = required("zstandard").ZstdCompressor(level=level, threads=threads)
        self._digests: dict[str, TensorDigest] = {}
        self._found: dict[str, str] = {}
        self._changed = self._changed_bytes = 0

    def run(self, metadata: dict[str, str]) -> Shipped:
        with ExitStack() as stack:
            spools = [
                stack.enter_context(StagedFile(self._folder / name)) for name in ("frames", "positions", "values")
            ]
            frames = self._frames(*spools)
            held = [[frames[name] for name in names if name in frames] for names in self._by_shard()]
            files = [entries for entries in held if entries]
            weight_map: dict[str, str] = {}
            size = 0
            for place, entries in enumerate(files):
                name = f"model-{place:05d}-of-{len(files):05d}.safetensors"
                with StagedFile(self._folder / name) as staged:
                    write_safetensors(
                        staged, entries, {one.name: self._found[one.name].rpartition(":")[2] for one in entries}
                    )
                    staged.commit()
                    size += staged.tell()
                weight_map |= {one.name: name for one in entries}
        index = json.dumps({"metadata": metadata, "weight_map": weight_map}, ensure_ascii=False).encode()
        write_whole(self._folder / INDEX_NAME, index)
        try:
            sync_folder(self._folder)
        except OSError as error:
            raise RunFileError(f"cannot write the output: {error.strerror}", file=self._folder) from error
        return shipped(self._sides, len(frames), self._changed, self._changed_bytes, len(files), size + len(index))

    def _by_shard(self) -> list[list[str]]:
        """Names of the tuned side, file by file, in the order of their bytes."""
        held: list[list[str]] = [[] for _ in self._layout.shards]
        for file, tensor in self._layout.tensors:
            held[file].append(tensor.name)
        return held

    def _frames(self, frames: StagedFile, positions: StagedFile, values: StagedFile) -> dict[str, Entry]:
        """Write the frames one after the other; an entry of each tensor that changed says where."""
        entries: dict[str, Entry] = {}
        names = [name for shard in self._by_shard() for name in shard]
        start, stream, unchanged = 0, None, 0
        for tensor, place, found in compared(self._sides, names, self._work, self._threads, self._stop, self._told):
            if place == 0:
                start, stream, unchanged = frames.tell(), None, 0
            if found is not None:
                payload, changed, changed_bytes = found
                self._changed += changed
                self._changed_bytes += changed_bytes
                if isinstance(payload, bytes):
                    frames.write(payload)
                elif self._overwrite:
                    positions.write(payload[0].view(np.uint8).data)
                    values.write(payload[1].data)
                else:
                    if stream is None:
                        stream = self._parallel.compressobj(size=tensor.nbytes)
                        for zeros in _zeros(unchanged):
                            frames.write(stream.compress(zeros))
                    frames.write(stream.compress(payload.data))
            elif stream is not None:
                block = BLOCK_CODES * Coding.of(tensor.dtype).width
                frames.write(stream.compress(bytes(min(block, tensor.nbytes - place * block))))
            else:
                unchanged += BLOCK_CODES * Coding.of(tensor.dtype).width
            if place == blocks_in(tensor) - 1:
                if stream is not None:
                    frames.write(stream.flush())
                elif values.tell():
                    self._join(frames, positions, values)
                if size := frames.tell() - start:
                    entries[tensor.name] = Entry(tensor.name, "U8", (size,), spooled(frames, start, size))
            for spool in (frames, positions, values):
                spool.check()
        return entries

    def _join(self, frames: StagedFile, positions: StagedFile, values: StagedFile) -> None:
        """Make a frame of the positions and the values of a large tensor, and begin again with the next."""
        count = values.tell()
        stream = self._parallel.compressobj(size=4 + 5 * count)
        frames.write(stream.compress(count.to_bytes(4, "little")))
        for spool, size in ((positions, 4 * count), (values, count)):
            for piece in pieces_of(spool, 0, size):
                frames.write(stream.compress(piece))
            spool.seek(0)
            spool.truncate(0)
        frames.write(stream.flush())

    def _work(self, tensor: TensorInfo, place: int, before: Bytes, after: Bytes) -> tuple[Any, int, int] | None:
        """What changed in a block: the whole frame of a tensor of one block, else what goes into it; or None."""
        coding, small = Coding.of(tensor.dtype), blocks_in(tensor) == 1
        if not small:
            self._digest(tensor, place, after)
        apart = before ^ after
        changed_bytes = int(np.count_nonzero(apart))
        if not changed_bytes:
            return None
        changed = int(np.count_nonzero(apart.view(f"u{coding.width}")))
        payload: Any = apart
        if self._overwrite:
            at = np.flatnonzero(apart)
            payload = (at + place * BLOCK_CODES * coding.width).astype("<u4"), after[at]
        if small:
            self._found[tensor.name] = digest_of(after, self._checksum)
            if self._overwrite:
                payload = b"".join([changed_bytes.to_bytes(4, "little"), *map(np.ndarray.tobytes, payload)])
            payload = self._compressor().compress(payload)
        return payload, changed, changed_bytes

    def _digest(self, tensor: TensorInfo, place: int, after: Bytes) -> None:
        digest = self._digests.setdefault(tensor.name, TensorDigest(self._stop, self._checksum))
        digest.add(place, after)
        if place == blocks_in(tensor) - 1:
            self._found[tensor.name] = self._digests.pop(tensor.name).value()

    def _compressor(self) -> Any:
        """One of each thread; none may be used by two at a time."""
        found = getattr(self._compressors, "found", None)
        if found is None:
            found = self._compressors.found = required("zstandard").ZstdCompressor(level=self._level)
        return found


def _zeros(count: int) -> Iterator[bytes]:
    piece = bytes(min(count, 1 << 20))
    for at in range(0, count, 1 << 20):
        yield piece[: min(1 << 20, count - at)]
