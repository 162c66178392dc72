"""Follow tensors through a chain of deltas: which bytes each begins with, and what every link does to them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import Checkpoint, TensorInfo
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.errors import PatchError, first_few
from ckptdiff.patch.coded_block import DamagedBlockError, Steps, apply_block, read_block
from ckptdiff.patch.delta import BLOCK_CODES, TensorDelta
from ckptdiff.patch.delta_file import DeltaFile
from ckptdiff.patch.digests import TensorDigest, digest_of
from ckptdiff.patch.spans import Piece, read_block_of

__all__ = ["Chain", "change_of", "check_links"]

Bytes = NDArray[np.uint8]


def check_links(links: Sequence[DeltaFile]) -> None:
    """Refuse deltas that do not follow each other, by their digests.

    Raises
    ------
    PatchError
        It names the first tensor that one link leaves in another state than the next one takes it in.
    """
    for before, after in pairwise(links):
        left = {name: one for name, one in before.delta.tensors.items() if one.state != "lost"}
        taken = {name: one for name, one in after.delta.tensors.items() if one.state != "whole" or one.replaces}
        for name in [*taken, *left]:
            if name in left and name in taken and taken[name].before in (None, left[name].after):
                continue
            hint = None
            if any(_leads_to(first, second) for first in links for second in links if first is not second):
                hint = "give the patches in the order in which they were made"
            raise PatchError(
                "the patch does not follow the one before it",
                file=after.path,
                tensor=name,
                expected=f"the tensor as {before.path} leaves it",
                found="another value, or none" if name in left else f"a tensor that {before.path} does not have",
                hint=hint,
            )


def _leads_to(before: DeltaFile, after: DeltaFile) -> bool:
    left = {name: one.after for name, one in before.delta.tensors.items() if one.state != "lost"}
    return all(one.before in (None, left.get(name)) for name, one in after.delta.tensors.items())


def change_of(link: DeltaFile, tensor: TensorDelta, place: int) -> Steps | Bytes | None:
    """What a link does to one block of a tensor; steps are valid until the next is read in this thread.

    Raises PatchError if the block is damaged.
    """
    if not tensor.sizes:
        return None
    numel = min(BLOCK_CODES, tensor.codes - place * BLOCK_CODES)
    try:
        return read_block(link.block(tensor, place), numel, tensor.coding)
    except DamagedBlockError as error:
        raise link.damaged("a block of the patch is damaged", "what ckptdiff writes", error, tensor.name) from error


class Chain:
    """The tensors that a chain makes of a base, block by block; its methods are called by many threads.

    Raises
    ------
    PatchError
        The links do not follow each other, or the base lacks a tensor or has it in another dtype or shape.
    """

    def __init__(self, base: Checkpoint, links: Sequence[DeltaFile]) -> None:
        check_links(links)
        self.base, self.links, self.stop = base, links, threading.Event()
        self.tensors: Mapping[str, TensorDelta] = {
            name: one for name, one in links[-1].delta.tensors.items() if one.state != "lost"
        }
        self._origins = {name: self._origin(name) for name in self.tensors}
        self._require_base()
        self._digests: dict[str, tuple[TensorDigest, TensorDigest]] = {}

    def takes_base(self, name: str) -> bool:
        """Whether a tensor begins with bytes of the base."""
        return self._origins[name] == 0 and self.links[0].delta.tensors[name].state != "whole"

    def unchanged_names(self) -> set[str]:
        """Tensors that no link changes."""
        return {
            name
            for name in self.tensors
            if self.takes_base(name) and all(link.delta.tensors[name].state == "same" for link in self.links)
        }

    def made(self, shards: OpenShards, pieces: Sequence[Piece]) -> list[tuple[Piece, Bytes]]:
        """The bytes of blocks, with digests of base and result checked at the end of each tensor."""
        return [(piece, self._block(shards, *piece)) for piece in pieces]

    def _block(self, shards: OpenShards, name: str, place: int) -> Bytes:
        tensor = self.tensors[name]
        coding, origin = tensor.coding, self._origins[name]
        numel = min(BLOCK_CODES, tensor.codes - place * BLOCK_CODES)
        codes = np.empty(numel * coding.width, np.uint8)
        before = None
        if self.takes_base(name):
            read_block_of(shards, self.base.tensors[name], coding, place, codes)
            before = self._digest(name, place, 0, codes)
        for link in self.links[origin:]:
            one = link.delta.tensors[name]
            if one.blocks:
                apply_block(codes, change_of(link, one, place), coding)
        after = self._digest(name, place, 1, codes)
        if place == max(tensor.blocks, 1) - 1:
            self._digests.pop(name, None)
            if before is not None and before != self.links[0].delta.tensors[name].before:
                raise self._not_the_base(name, before)
            if after != tensor.after:
                raise self.links[-1].damaged(
                    "the tensor is not what it should become: the patch is damaged",
                    f"digest {tensor.after}",
                    after,
                    name,
                )
        return codes

    def _digest(self, name: str, place: int, which: int, codes: Bytes) -> str:
        """Digest of a tensor up to a block, the whole of it at its last one."""
        if self.tensors[name].blocks <= 1:
            return digest_of(codes)
        both = self._digests.setdefault(name, (TensorDigest(self.stop), TensorDigest(self.stop)))
        both[which].add(place, codes)
        return both[which].value() if place == self.tensors[name].blocks - 1 else ""

    def _origin(self, name: str) -> int:
        """The last link that brings the tensor whole; else the first, which takes it from the base."""
        for place in range(len(self.links) - 1, -1, -1):
            if self.links[place].delta.tensors[name].state == "whole":
                return place
        return 0

    def _require_base(self) -> None:
        file = self.links[0].path
        for name, one in self.links[0].delta.tensors.items():
            if one.state in ("same", "changed"):
                found = self.base.tensors.get(name)
                if found is None or (found.dtype, found.shape) != (one.dtype, one.shape):
                    raise PatchError(
                        "the base is not the one that the patch was made for",
                        file=file,
                        tensor=name,
                        expected=f"{one.dtype} {list(one.shape)} in {self.base.path}",
                        found="no such tensor" if found is None else _kind(found),
                    )
        strange = [name for name in self.base.tensors if name not in self.links[0].delta.tensors]
        if strange:
            raise PatchError(
                "the base is not the one that the patch was made for",
                file=file,
                expected=f"a base without further tensors, as {self.links[0].delta.base} was",
                found=f"{len(strange)} more in {self.base.path}: {first_few(strange)}",
            )

    def _not_the_base(self, name: str, found: str) -> PatchError:
        applied = found == self.tensors[name].after
        return PatchError(
            "the patch has been applied already" if applied else "the base is not the one that the patch was made for",
            file=self.links[0].path,
            tensor=name,
            expected=f"values with the digest {self.links[0].delta.tensors[name].before}",
            found=f"{found} in {self.base.tensors[name].shard.path}",
            hint=None if applied else f"it was made for {self.links[0].delta.base}",
        )


def _kind(tensor: TensorInfo) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
