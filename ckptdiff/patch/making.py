"""Write the files of a result, each block made by one of several threads."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ckptdiff.checkpoint import Checkpoint
from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.checkpoint.strict_json import JsonProblemError, parse_object
from ckptdiff.errors import PatchError
from ckptdiff.events import Stage
from ckptdiff.files.staged import StagedFile
from ckptdiff.patch.chain import Chain
from ckptdiff.patch.delta import TunedFile
from ckptdiff.patch.digests import CHECKSUMS, checksum_of, digests_of
from ckptdiff.patch.spans import Piece, in_pieces, work_in_order

__all__ = ["Making", "kind_of"]

_ROOM = 2 << 20
"""Bytes of a block in the formats of most checkpoints."""


class Making:
    """Writes the files of a result, each block made by one of several threads."""

    def __init__(self, chain: Chain, threads: int, told: Stage) -> None:
        self._chain, self._threads, self._told = chain, threads, told
        self._link = chain.links[-1]
        self._held: list[list[tuple[str, int]]] = [[] for _ in self._link.delta.files]
        for name, tensor in chain.tensors.items():
            self._held[tensor.file].append((name, tensor.codes))

    def file(self, one: TunedFile, target: Path) -> None:
        """Write a file whole, and let it take its name."""
        place = self._link.delta.files.index(one)
        with StagedFile(target) as staged:
            header = self._link.header(place)
            staged.write(header)
            self._told.more(len(header), one.name)
            self._require_header(place, header, one)
            self._blocks(place, len(header), staged)
            staged.commit()

    def check(self, place: int) -> None:
        """Make the blocks of a file, and write them nowhere."""
        one = self._link.delta.files[place]
        header = self._link.header(place)
        self._require_header(place, header, one)
        self._told.more(len(header), one.name)
        self._blocks(place, len(header), None)

    def compare(self, side: Checkpoint, names: Iterable[str]) -> None:
        """Compare tensors of a checkpoint that is there with what they become."""
        tensors, base = self._chain.tensors, self._chain.base
        missing = [name for name in names if kind_of(side, name) != (tensors[name].dtype, tensors[name].shape)]
        expected = {name: tensors[name].after for name in names if name not in missing}
        # What a directory of deltas does not name is as it is in the base.
        unnamed = {name: CHECKSUMS[0] for name, digest in expected.items() if digest is None}
        expected |= dict(digests_of(base, unnamed, self._threads, self._told))
        checksums = {name: checksum_of(digest or "") for name, digest in expected.items()}
        for name, found in digests_of(side, checksums, self._threads, self._told):
            if found != expected[name]:
                raise _not_the_result(side, name, f"digest {expected[name]}", found)
        if missing:
            kind = f"{tensors[missing[0]].dtype} {list(tensors[missing[0]].shape)}"
            raise _not_the_result(side, missing[0], kind, kind_of(side, missing[0]) or "no such tensor")

    def _blocks(self, place: int, header: int, staged: StagedFile | None) -> None:
        """Make all blocks of a file; each thread writes those that it makes, behind a header of so many bytes."""
        self._chain.stop.clear()  # it was set when the file before this was done
        rooms = threading.local()

        def pieces() -> Iterator[tuple[list[Piece], int, int]]:
            start = header
            for some in in_pieces(self._held[place]):
                size = self._chain.size_of(some)
                yield some, start, size
                start += size

        def work(given: tuple[list[Piece], int, int]) -> tuple[int, str]:
            some, start, size = given
            room = getattr(rooms, "room", None)
            if room is None or room.size < size:
                room = rooms.room = np.empty(max(size, _ROOM), np.uint8)
            self._chain.make(shards, some, room[:size])
            if staged is not None:
                staged.write_at(room[:size].data, start)
            return size, some[-1][0]

        with open_shards("pread") as shards:
            for size, name in work_in_order(pieces(), work, self._threads, self._chain.stop, self._told.again):
                self._told.more(size, name)

    def _require_header(self, place: int, header: bytes, one: TunedFile) -> None:
        """The header that goes into the file has to say what the index says of its tensors."""
        entries = self._entries(header)
        at, right = 0, int.from_bytes(header[:8], "little") == len(header) - 8
        for name, _ in self._held[place]:
            tensor = self._chain.tensors[name]
            start, at = at, at + tensor.nbytes
            right = right and entries.pop(name, None) == (tensor.dtype, tensor.shape, (start, at))
        if entries or not right:
            raise self._link.damaged(
                "a header in the patch is not that of its tensors", "the tensors of its index", one.name
            )

    def _entries(self, header: bytes) -> dict[str, object]:
        """What a header says of each tensor."""
        digest, base = hashlib.sha256(header).hexdigest(), self._chain.base
        for shard in base.shards:
            if shard.header_sha256 == digest:  # it has been read already, as a rule
                held = (one for one in base.tensors.values() if one.shard.path == shard.path)
                at = len(header)
                return {one.name: (one.dtype, one.shape, (one.start - at, one.stop - at)) for one in held}
        try:
            entries = parse_object(header[8:])
            entries.pop("__metadata__", None)
            return {
                name: (one["dtype"], tuple(one["shape"]), tuple(one["data_offsets"])) if len(one) == 3 else None
                for name, one in entries.items()
            }
        except (JsonProblemError, KeyError, TypeError):
            return {"": None}


def kind_of(side: Checkpoint, name: str) -> tuple[str, tuple[int, ...]] | None:
    """Dtype and shape of a tensor, if a checkpoint has it."""
    tensor = side.tensors.get(name)
    return None if tensor is None else (tensor.dtype, tensor.shape)


def _not_the_result(side: Checkpoint, name: str, expected: object, found: object) -> PatchError:
    return PatchError(
        "not what the patches make of the base", file=side.path, tensor=name, expected=expected, found=found
    )
