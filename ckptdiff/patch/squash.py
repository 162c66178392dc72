"""Make one delta of a chain of them, without any checkpoint: steps add up."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ckptdiff.errors import OptionError
from ckptdiff.events import Listener, stage
from ckptdiff.files.staged import StagedFile
from ckptdiff.patch.chain import check_links
from ckptdiff.patch.coded_block import Coding, Steps, apply_block, code_steps, code_whole
from ckptdiff.patch.delta import BLOCK_CODES, Blob, Delta, TensorDelta
from ckptdiff.patch.delta_file import SIGNATURE, DeltaFile, open_delta, write_blob, write_index
from ckptdiff.patch.delta_index import IndexText
from ckptdiff.patch.opening import patch_kind
from ckptdiff.patch.spans import load_kernels
from ckptdiff.runfile.check_target import check_new

__all__ = ["squash"]

Bytes = NDArray[np.uint8]


def squash(
    patches: Sequence[str | os.PathLike[str]], target: str | os.PathLike[str], *, listener: Listener | None = None
) -> Delta:
    """Write one patch that does what several do one after the other.

    Parameters
    ----------
    patches : sequence of path-like
        Exact deltas in the order in which they were made, two at least.
    target : path-like
        The patch to write; it must not exist.
    listener : callable, optional
        Told of the stage "squashing", in bytes of the patches.

    Returns
    -------
    Delta

    Raises
    ------
    PatchError
        A patch is none or is damaged, or does not follow the one before.
    RunFileError
        The target exists or cannot be written.

    Examples
    --------
    >>> from ckptdiff import patch
    >>> base, tuned = "fixtures/addition/base", "fixtures/addition/tuned"
    >>> steps = [patch.make(base, tuned, "1.ckptdelta"), patch.make(tuned, base, "2.ckptdelta")]
    >>> sum(one.changed for one in patch.squash(["1.ckptdelta", "2.ckptdelta"], "both.ckptdelta").tensors.values())
    0
    """
    target = Path(target)
    if len(patches) < 2:
        raise OptionError("there is nothing to squash", expected="two patches or more", found=f"{len(patches)}")
    for path in patches:
        if patch_kind(path) != "delta":
            raise OptionError("only patches in ckptdiff's own format can be made one", file=Path(path))
    with ExitStack() as stack:
        links = [stack.enter_context(open_delta(path)) for path in patches]
        check_links(links)
        check_new(target)
        load_kernels(listener)
        staged = stack.enter_context(StagedFile(target))
        with stage(listener, "squashing", sum(link.size for link in links), "bytes") as told:
            staged.write(SIGNATURE)
            last = links[-1].delta
            files = tuple(replace(one, header=_moved(links[-1], one.header, staged)) for one in last.files)
            index = None if last.index is None else (last.index[0], _moved(links[-1], last.index[1], staged))
            tensors = {}
            for name, tensor in last.tensors.items():
                tensors[name] = _joined(links, tensor, staged)
                staged.check()
                told.more(sum(link.delta.tensors[name].stored for link in links if name in link.delta.tensors), name)
            delta = replace(
                last,
                base=links[0].delta.base,
                base_files=links[0].delta.base_files,
                files=files,
                index=index,
                tensors=_with_lost(links, tensors),
            )
            text = IndexText(delta)
            text.add(delta.tensors.values())
            write_index(staged, text)
        staged.commit()
    return delta


def _moved(link: DeltaFile, blob: Blob, staged: StagedFile) -> Blob:
    return write_blob(staged, link.blob(blob))


def _with_lost(links: Sequence[DeltaFile], tensors: dict[str, TensorDelta]) -> dict[str, TensorDelta]:
    """Only what the first base had can be lost."""
    kept = {name: one for name, one in tensors.items() if one.state != "lost"}
    for link in links:
        for name, one in link.delta.tensors.items():
            if one.state == "lost" and name not in kept and _in_base(links, name):
                kept[name] = one
    return kept


def _in_base(links: Sequence[DeltaFile], name: str) -> bool:
    first = links[0].delta.tensors.get(name)
    return first is not None and (first.state != "whole" or first.replaces)


def _joined(links: Sequence[DeltaFile], tensor: TensorDelta, staged: StagedFile) -> TensorDelta:
    """One tensor of the result, with its blocks written."""
    if tensor.state == "lost":
        return tensor
    chain = [(link, link.delta.tensors[tensor.name]) for link in _since_whole(links, tensor.name)]
    whole = chain[0][1].state == "whole"
    offset, sizes, changed = staged.tell(), [], 0
    for place in range(tensor.blocks):
        numel = min(BLOCK_CODES, tensor.codes - place * BLOCK_CODES)
        data, count = _block(chain, place, numel, tensor.coding)
        staged.write(data)
        sizes.append(len(data))
        changed += count
    if whole:
        replaces = _in_base(links, tensor.name)
        return tensor._replace(
            state="whole",
            before=None,
            changed=tensor.codes,
            offset=offset,
            sizes=tuple(sizes),
            replaces=replaces,
        )
    before = chain[0][1].before
    if not changed:
        return tensor._replace(state="same", before=before, changed=0, offset=0, sizes=())
    return tensor._replace(state="changed", before=before, changed=changed, offset=offset, sizes=tuple(sizes))


def _since_whole(links: Sequence[DeltaFile], name: str) -> list[DeltaFile]:
    """The links from the last one on that brings a tensor whole."""
    wholes = [
        place
        for place, link in enumerate(links)
        if name in link.delta.tensors and link.delta.tensors[name].state == "whole"
    ]
    return list(links[wholes[-1] if wholes else 0 :])


def _block(chain: Sequence[tuple[DeltaFile, TensorDelta]], place: int, numel: int, coding: Coding) -> tuple[bytes, int]:
    """A block of the result, and how many of its codes change."""
    known: Bytes | None = None
    summed: Steps | None = None
    for link, tensor in chain:
        change = link.change(tensor, place)
        if isinstance(change, np.ndarray):
            known = change.copy()
        elif isinstance(change, Steps):
            if known is not None:
                apply_block(known, change, coding)
            else:
                summed = _sum(summed, change, coding)
    if known is not None:
        return code_whole(known), numel
    if summed is None:
        return b"", 0
    return code_steps(summed, numel, coding), summed.positions.size


def _sum(first: Steps | None, second: Steps, coding: Coding) -> Steps:
    """Steps that lead as far as both, one after the other."""
    if first is None:
        return Steps(second.positions.copy(), second.z.copy())
    positions, places = np.unique(np.concatenate([first.positions, second.positions]), return_inverse=True)
    total = np.zeros(positions.size, np.uint64)
    np.add.at(total, places, np.concatenate([_signed(first.z), _signed(second.z)]))
    bits = np.uint64(8 * coding.width)
    if coding.width < 8:
        total &= (np.uint64(1) << bits) - np.uint64(1)
    moved = total != 0
    positions, total = positions[moved], total[moved]
    one, full = np.uint64(1), np.uint64((1 << (8 * coding.width)) - 1)
    negative = (total >> (bits - one)).astype(bool)
    z = np.where(negative, ((~total & full) << one) | one, (total - one) << one)
    return Steps(positions.astype(np.uint32), z)


def _signed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Steps modulo 2^64."""
    one = np.uint64(1)
    size = (z >> one) + one
    return np.where(z & one, ~size + one, size)
