"""Follow tensors through a chain of deltas: which bytes each begins with, and what every link does to them."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import Checkpoint, TensorInfo
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.errors import PatchError, first_few
from ckptdiff.patch.delta import BLOCK_CODES, TensorDelta
from ckptdiff.patch.digests import TensorDigest, checksum_of, digest_of, digests_of_parts
from ckptdiff.patch.link import Link
from ckptdiff.patch.spans import Piece, read_block_of, read_whole_tensors

__all__ = ["Chain", "check_links"]

Bytes = NDArray[np.uint8]


def check_links(links: Sequence[Link]) -> None:
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
            if name in left and name in taken and _follows(left[name], taken[name]):
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


def _follows(before: TensorDelta, after: TensorDelta) -> bool:
    """Whether one link takes a tensor as another leaves it; the same bytes of another shape have other blocks."""
    if after.state == "whole":
        return True
    kinds = (before.dtype, before.shape), (after.dtype, after.shape)
    return after.before in (None, before.after) and (after.state == "lost" or kinds[0] == kinds[1])


def _leads_to(before: Link, after: Link) -> bool:
    left = {name: one.after for name, one in before.delta.tensors.items() if one.state != "lost"}
    return all(one.before in (None, left.get(name)) for name, one in after.delta.tensors.items())


class Chain:
    """The tensors that a chain makes of a base, block by block; its methods are called by many threads.

    Raises
    ------
    PatchError
        The links do not follow each other, or the base lacks a tensor or has it in another dtype or shape.
    """

    def __init__(self, base: Checkpoint, links: Sequence[Link]) -> None:
        check_links(links)
        self.base, self.links, self.stop = base, links, threading.Event()
        self.tensors: Mapping[str, TensorDelta] = {
            name: one for name, one in links[-1].delta.tensors.items() if one.state != "lost"
        }
        # Of each tensor that a link brings whole, the last one that does.
        self._origins = {
            name: place
            for place, link in enumerate(links)
            for name, one in link.delta.tensors.items()
            if one.state == "whole"
        }
        self._require_base()
        self._unchanged = {
            name
            for name, one in self.tensors.items()
            if one.state == "same"
            and self.takes_base(name)
            and all(link.delta.tensors[name].state == "same" for link in self.links)
        }
        self._digests: dict[tuple[str, int], TensorDigest] = {}
        self.repeated: set[str] = set()
        """Tensors that were new already, by patches that may be applied again; complete when all blocks are made."""

    def takes_base(self, name: str) -> bool:
        """Whether a tensor begins with bytes of the base."""
        return name not in self._origins

    def unchanged_names(self) -> Set[str]:
        """Tensors that no link changes."""
        return self._unchanged

    def size_of(self, pieces: Sequence[Piece]) -> int:
        """Bytes of blocks."""
        if len(pieces) > 1:
            return sum([self.tensors[name].nbytes for name, _ in pieces])
        ((name, place),) = pieces
        tensor = self.tensors[name]
        return min(BLOCK_CODES, tensor.codes - place * BLOCK_CODES) * tensor.coding.width

    def make(self, shards: OpenShards, pieces: Sequence[Piece], out: Bytes) -> None:
        """Make the bytes of blocks, one behind the other; digests are checked at the end of each tensor.

        Several blocks are tensors of one block each, which travel together.
        """
        if len(pieces) == 1:
            self.block(shards, *pieces[0], out)
            return
        names = [name for name, _ in pieces]
        starts = [0, *accumulate([self.tensors[name].nbytes for name in names])]
        parts = dict(zip(names, pairwise(starts), strict=True))
        taken = [name for name in names if name not in self._origins]
        self._read_small(shards, taken, [parts[name][0] for name in taken], out)
        before = self._digests_of(taken, parts, out, 0)
        for depth, link in enumerate(self.links):
            ones = [link.delta.tensors[name] for name in names if self._origins.get(name, 0) <= depth]
            ones = [one for one in ones if one.codes]
            link.apply_small(ones, [parts[one.name][0] for one in ones], out, self.stop)
        after = before | self._digests_of([name for name in names if name not in self._unchanged], parts, out, 1)
        for name in names:
            self._check(name, before.get(name), after[name])

    def block(self, shards: OpenShards, name: str, place: int, codes: Bytes, *, keep: bool = False) -> Bytes | None:
        """Make the bytes of one block; returns what they were before, if that is to be kept and the base has them."""
        tensor = self.tensors[name]
        before = old = None
        if self.takes_base(name):
            self._read(shards, name, place, codes)
            before = self._digest(name, place, 0, codes)
            old = codes.copy() if keep else None
        after = before
        if name not in self._unchanged:
            for link in self.links[self._origins.get(name, 0) :]:
                one = link.delta.tensors[name]
                if one.blocks:
                    link.apply(one, place, codes, self.stop)
            after = self._digest(name, place, 1, codes)
        if place == max(tensor.blocks, 1) - 1:
            for which in (0, 1):
                self._digests.pop((name, which), None)
            self._check(name, before, after)
        return old

    def _read(self, shards: OpenShards, name: str, place: int, codes: Bytes) -> None:
        """Fill an array with the base's bytes of a block."""
        read_block_of(shards, self.base.tensors[name], self.tensors[name].coding, place, codes)

    def _read_small(self, shards: OpenShards, names: Sequence[str], starts: Sequence[int], out: Bytes) -> None:
        """Read tensors of the base whole, each to its place."""
        read_whole_tensors(shards, zip((self.base.tensors[name] for name in names), starts, strict=True), out)

    def _place_of(self, name: str) -> str:
        """Where the base's bytes of a tensor lie."""
        return self.base.tensors[name].shard.path

    def _check(self, name: str, before: str | None, after: str | None) -> None:
        """Compare the digests of a tensor with what the patches say of them."""
        taken, made = self._taken(name), self.tensors[name].after
        if before is not None and taken is not None and before != taken:
            raise self._not_the_base(name, before)
        if after != made:
            if before == made:
                raise self._not_the_base(name, str(before))
            problem = "the tensor is not what it should become: the patch is damaged"
            if taken is None:
                problem += ", or was made for another base"
            raise self.links[-1].damaged(problem, f"digest {made}", after, name)
        if before == made and any(
            link.repeatable and link.delta.tensors[name].state == "changed" for link in self.links
        ):
            self.repeated.add(name)

    def _taken(self, name: str) -> str | None:
        """Digest of the base's bytes, if the first patch says it; a later one may bring a tensor that is new."""
        one = self.links[0].delta.tensors.get(name)
        return None if one is None else one.before

    def _checksum(self, name: str, which: int) -> str | None:
        """Which checksum a tensor's digest before or after is to be; None where no patch has one."""
        made = self.tensors[name].after
        if made is not None and which == 0:
            # What a directory of deltas takes has no digest; that of what it makes tells whether it was applied.
            made = self._taken(name) or made
        return made and checksum_of(made)

    def _digest(self, name: str, place: int, which: int, codes: Bytes) -> str | None:
        """Digest of a tensor up to a block, the whole of it at its last one."""
        checksum = self._checksum(name, which)
        if checksum is None:
            return None
        if self.tensors[name].blocks <= 1:
            return digest_of(codes, checksum)
        digest = self._digests.setdefault((name, which), TensorDigest(self.stop, checksum))
        digest.add(place, codes)
        return digest.value() if place == self.tensors[name].blocks - 1 else ""

    def _digests_of(
        self, names: Sequence[str], parts: Mapping[str, tuple[int, int]], out: Bytes, which: int
    ) -> dict[str, str | None]:
        """Digests of tensors that lie at these parts of an array, those of a kind together."""
        found: dict[str, str | None] = {}
        of_kind: defaultdict[str | None, list[str]] = defaultdict(list)
        for name in names:
            of_kind[self._checksum(name, which)].append(name)
        for checksum, some in of_kind.items():
            if checksum is None:
                found |= dict.fromkeys(some)
            else:
                found |= zip(some, digests_of_parts(out, [parts[name] for name in some], checksum), strict=True)
        return found

    def _require_base(self) -> None:
        file = self.links[0].path
        for name, one in self.links[0].delta.tensors.items():
            if one.state in ("same", "changed"):
                found = self.base.tensors.get(name)
                if found is None or found.dtype != one.dtype or found.shape != one.shape:
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
        applied, made_for = found == self.tensors[name].after, self.links[0].delta.base
        return PatchError(
            "the patch has been applied already" if applied else "the base is not the one that the patch was made for",
            file=self.links[0].path,
            tensor=name,
            expected="its base" if applied else f"values with the digest {self._taken(name)}",
            found=f"{found} in {self._place_of(name)}",
            hint=f"it was made for {made_for}" if made_for and not applied else None,
        )


def _kind(tensor: TensorInfo) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
