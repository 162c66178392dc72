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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ckptdiff.checkpoint import Checkpoint, TensorInfo
from ckptdiff.checkpoint.checkpoint import open_pair
from ckptdiff.errors import OptionError, PatchError, RunFileError
from ckptdiff.events import Listener
from ckptdiff.files.staged import StagedFile, StagedFolder, sync_folder, write_whole
from ckptdiff.patch.coded_block import Coding
from ckptdiff.patch.comparing import (
    Bytes,
    PairBlocks,
    Shipped,
    Sides,
    blocks_in,
    make_of_pair,
    pieces_of,
    require_same_tensors,
    shipped,
)
from ckptdiff.patch.delta import BLOCK_CODES
from ckptdiff.patch.digests import CHECKSUMS, BlockDigests, digest_of, required
from ckptdiff.patch.side_files import SideFiles
from ckptdiff.runfile.check_target import check_new
from ckptdiff.runfile.safetensors_file import header_bytes

__all__ = [
    "ENCODINGS",
    "INDEX_NAME",
    "OVERWRITE_LIMIT",
    "DirectoryMaking",
    "begin_directory",
    "folder_name",
    "make_directory",
]

ENCODINGS = ("xor", "overwrite")
INDEX_NAME = "model.safetensors.index.json"
OVERWRITE_LIMIT = 1 << 32
"""Bytes of a tensor from which uint32 positions do not reach its end."""
_VERSIONED = re.compile(r"weight_v(\d{6,})")
_MOST_VERSION = 999_999_999
_CODES = {width: np.dtype(f"u{width}") for width in (1, 2, 4, 8)}


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
    sides = open_pair(os.fspath(base), os.fspath(tuned))
    check_new(target)
    begin = partial(
        begin_directory,
        sides,
        target,
        encoding=encoding,
        checksum=checksum,
        version=version,
        base_version=base_version,
        level=level,
    )
    return make_of_pair(sides, begin, threads, listener)


@contextmanager
def begin_directory(
    sides: Sides,
    target: Path,
    stop: threading.Event,
    threads: int,
    *,
    encoding: str = "xor",
    checksum: str = CHECKSUMS[0],
    version: int | None = None,
    base_version: int | None = None,
    level: int = 1,
) -> Iterator[DirectoryMaking]:
    """Begin a directory of two sides, which :func:`~ckptdiff.patch.comparing.make_of_pair` goes on with.

    Parameters and errors as of :func:`make_directory`.
    """
    versions = _versions(target, version, base_version)
    for name, value, known in (("encoding", encoding, ENCODINGS), ("checksum", checksum, CHECKSUMS)):
        if value not in known:
            raise OptionError(f"no such {name}", expected=", ".join(known), found=value)
    if not 1 <= level <= 19:
        raise OptionError("zstd is used with no such level", expected="1 to 19", found=level)
    digest_of(b"", checksum)  # asks for its module
    zstandard = required("zstandard")
    require_same_tensors(sides, "a directory of deltas")
    if encoding == "overwrite":
        _require_reach(sides[1])
    facts = {
        "version": f"{versions[0]:06d}",
        "base_version": f"{versions[1]:06d}",
        "delta_encoding": encoding,
        "compression_format": "zstd",
        "checksum_format": checksum,
    }
    with StagedFolder(target) as folder, ExitStack() as stack:
        # Frames of large tensors are cut into jobs, whose bounds, and so the bytes, are the same with any number of
        # threads but none.
        parallel = zstandard.ZstdCompressor(level=level, threads=threads)
        small = partial(zstandard.ZstdCompressor, level=level)
        yield DirectoryMaking(sides, facts, parallel, small, folder, stack, stop)


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


class _Change(NamedTuple):
    """What changed in a block."""

    payload: Any
    """A whole frame, or what goes into one; None if nothing changed."""
    changed: int
    """Codes, and bytes."""
    changed_bytes: int
    digest: str | None
    """Of the new bytes of a tensor, with its last block."""


class _Frame(NamedTuple):
    """Where the frame of a tensor is kept, and the digest of its new bytes."""

    start: int
    size: int
    digest: str | None


class DirectoryMaking:
    """One directory: frames go to a file without a name, and from there, with their header, into safetensors files."""

    def __init__(
        self,
        sides: Sides,
        facts: dict[str, str],
        parallel: Any,
        small: Callable[[], Any],
        folder: StagedFolder,
        spools: ExitStack,
        stop: threading.Event,
    ) -> None:
        self._sides, self._facts, self._parallel, self._small = sides, facts, parallel, small
        self._folder, self._spools = folder, spools
        self._frames, self._positions, self._values = (
            spools.enter_context(StagedFile(folder.path / name)) for name in ("frames", "positions", "values")
        )
        layout = SideFiles(sides[1])
        self._by_shard: list[list[str]] = [[] for _ in layout.shards]
        for file, tensor in layout.tensors:
            self._by_shard[file].append(tensor.name)
        self.names = [name for names in self._by_shard for name in names]
        self._overwrite = facts["delta_encoding"] == "overwrite"
        self._digests = BlockDigests(stop, facts["checksum_format"])
        self._compressors = threading.local()
        self._made: dict[str, _Frame] = {}
        self._changed = self._changed_bytes = 0
        self._start, self._unchanged = 0, 0
        self._stream: Any = None

    def work(self, blocks: PairBlocks) -> list[_Change]:
        """What changed in each block: the whole frame of a tensor of one block, else what goes into it."""
        return [self._change(tensor, blocks.place, before, after) for tensor, before, after in blocks.each()]

    def _change(self, tensor: TensorInfo, place: int, before: Bytes, after: Bytes) -> _Change:
        width, blocks, digest = Coding.of(tensor.dtype).width, blocks_in(tensor), None
        if blocks > 1:
            (digest,) = self._digests.add(tensor.name, place, blocks, after) or (None,)
        apart = before ^ after
        changed_bytes = int(np.count_nonzero(apart))
        if not changed_bytes:
            return _Change(None, 0, 0, digest)
        changed = int(np.count_nonzero(apart.view(_CODES[width])))
        payload: Any = apart
        if self._overwrite:
            at = np.flatnonzero(apart)
            payload = (at + place * BLOCK_CODES * width).astype("<u4"), after[at]
        if blocks == 1:
            (digest,) = self._digests.add(tensor.name, place, blocks, after)
            if self._overwrite:
                payload = b"".join([changed_bytes.to_bytes(4, "little"), *map(np.ndarray.tobytes, payload)])
            payload = self._compressor().compress(payload)
        return _Change(payload, changed, changed_bytes, digest)

    def _compressor(self) -> Any:
        """One of each thread; none may be used by two at a time."""
        found = getattr(self._compressors, "found", None)
        if found is None:
            found = self._compressors.found = self._small()
        return found

    def take(self, tensors: Sequence[TensorInfo], place: int, found: Sequence[_Change]) -> None:
        """Write what changed in blocks; at the last of a tensor, note where its frame is."""
        self._changed += sum(one.changed for one in found)
        self._changed_bytes += sum(one.changed_bytes for one in found)
        if blocks_in(tensors[0]) > 1:
            self._add(tensors[0], place, found[0])
        else:
            end = self._frames.tell()
            frames = [(tensor.name, one) for tensor, one in zip(tensors, found, strict=True) if one.payload is not None]
            for name, one in frames:
                self._made[name] = _Frame(end, len(one.payload), one.digest)
                end += len(one.payload)
            self._frames.write(b"".join([one.payload for _, one in frames]))
        for spool in (self._frames, self._positions, self._values):
            spool.check()

    def _add(self, tensor: TensorInfo, place: int, found: _Change) -> None:
        """Write what changed in a block of a large tensor."""
        block = BLOCK_CODES * Coding.of(tensor.dtype).width
        if place == 0:
            self._start, self._stream, self._unchanged = self._frames.tell(), None, 0
        if found.payload is not None:
            if self._overwrite:
                self._positions.write(found.payload[0].view(np.uint8).data)
                self._values.write(found.payload[1].data)
            else:
                if self._stream is None:
                    self._stream = self._parallel.compressobj(size=tensor.nbytes)
                    for zeros in _zeros(self._unchanged):
                        self._frames.write(self._stream.compress(zeros))
                self._frames.write(self._stream.compress(found.payload.data))
        elif self._stream is not None:
            self._frames.write(self._stream.compress(bytes(min(block, tensor.nbytes - place * block))))
        else:
            self._unchanged += block
        if place == blocks_in(tensor) - 1:
            if self._stream is not None:
                self._frames.write(self._stream.flush())
            elif self._values.tell():
                self._join()
            if size := self._frames.tell() - self._start:
                self._made[tensor.name] = _Frame(self._start, size, found.digest)

    def _join(self) -> None:
        """Make a frame of the positions and the values of a large tensor, and begin again with the next."""
        count = self._values.tell()
        stream = self._parallel.compressobj(size=4 + 5 * count)
        self._frames.write(stream.compress(count.to_bytes(4, "little")))
        for spool, size in ((self._positions, 4 * count), (self._values, count)):
            for piece in pieces_of(spool, 0, size):
                self._frames.write(stream.compress(piece))
            spool.seek(0)
            spool.truncate(0)
        self._frames.write(stream.flush())

    def finish(self) -> Shipped:
        """Copy the frames into files, write the index behind them, and let the directory take its name."""
        made, folder = self._made, self._folder.path
        files = [some for names in self._by_shard if (some := [name for name in names if name in made])]
        weight_map: dict[str, str] = {}
        size = 0
        for place, some in enumerate(files):
            file = f"model-{place:05d}-of-{len(files):05d}.safetensors"
            with StagedFile(folder / file) as staged:
                self._write(staged, some)
                staged.commit()
                size += staged.tell()
            weight_map |= dict.fromkeys(some, file)
        self._spools.close()
        index = json.dumps({"metadata": self._facts, "weight_map": weight_map}, ensure_ascii=False).encode()
        write_whole(folder / INDEX_NAME, index)
        try:
            sync_folder(folder)
        except OSError as error:
            raise RunFileError(f"cannot write the output: {error.strerror}", file=folder) from error
        self._folder.commit()
        return shipped(self._sides, len(made), self._changed, self._changed_bytes, len(files), size + len(index))

    def _write(self, staged: StagedFile, names: Sequence[str]) -> None:
        """Write a safetensors file; frames that lie one behind the other are copied together."""
        made = [self._made[name] for name in names]
        shapes = ((name, "U8", (one.size,), one.size) for name, one in zip(names, made, strict=True))
        digests = {name: str(one.digest).rpartition(":")[2] for name, one in zip(names, made, strict=True)}
        staged.write(header_bytes(shapes, digests))
        runs: list[tuple[int, int]] = []
        for start, size, _ in made:
            first, end = runs.pop() if runs and runs[-1][1] == start else (start, start)
            runs.append((first, end + size))
        for first, end in runs:
            for piece in pieces_of(self._frames, first, end - first):
                staged.write(piece)
                staged.check()


def _zeros(count: int) -> Iterator[bytes]:
    piece = bytes(min(count, 1 << 20))
    for at in range(0, count, 1 << 20):
        yield piece[: min(1 << 20, count - at)]
