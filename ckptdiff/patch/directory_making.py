"""Make the frames of a directory of deltas, and write the files that hold them.

Frames of small tensors are made and written together; those of large ones block by block, in turns.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from ckptdiff.checkpoint import TensorInfo
from ckptdiff.errors import RunFileError
from ckptdiff.files.staged import StagedFile, StagedFolder, sync_folder, write_whole
from ckptdiff.patch.coded_block import Coding
from ckptdiff.patch.comparing import Bytes, PairBlocks, Shipped, Sides, blocks_in, pieces_of, shipped
from ckptdiff.patch.delta import BLOCK_CODES
from ckptdiff.patch.digests import BlockDigests
from ckptdiff.patch.side_files import SideFiles
from ckptdiff.runfile.safetensors_file import header_bytes

__all__ = ["INDEX_NAME", "DirectoryMaking"]

INDEX_NAME = "model.safetensors.index.json"
_CODES = {width: np.dtype(f"u{width}") for width in (1, 2, 4, 8)}


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
