"""Write a sparse patch: the tuned values of the masked coordinates."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ckptdiff.checkpoint import DTYPES, TensorInfo
from ckptdiff.checkpoint.open_shards import OpenShards, open_shards
from ckptdiff.errors import OptionError, RunFileError
from ckptdiff.events import Listener, Stage, stage
from ckptdiff.files.staged import StagedFile
from ckptdiff.measure.partial import BLOCK
from ckptdiff.runfile.check_target import check_folder
from ckptdiff.runfile.export import chosen_masks
from ckptdiff.runfile.identity import KnownNorm, checked_blocks, known_norms, open_side
from ckptdiff.runfile.mask import Mask
from ckptdiff.runfile.reader import RunFile
from ckptdiff.runfile.safetensors_file import Entry, is_safetensors_of, write_safetensors
from ckptdiff.runfile.schema import BIT_ORDER, mask_chunks

PATCH_FORMAT = "ckptdiff-patch"


def export_patch(
    run: RunFile,
    target: str | os.PathLike[str],
    *,
    names: Sequence[str] = (),
    tuned: str | os.PathLike[str] | None = None,
    stream: bool = False,
    listener: Listener | None = None,
) -> int:
    """Write where the masked coordinates are and what the tuned checkpoint holds there.

    For each tensor ``NAME`` with masked coordinates there are ``NAME.indices``, row-major and ascending, int32 where
    that is enough, else int64, and ``NAME.values`` in the tuned side's dtype. With a bitwise mask of ``--compare
    stored``, ``base.view(-1)[indices] = values`` makes the tuned tensor of the base; masks of other rules leave smaller
    changes out. The metadata say which rule it was, and name both sides' shards with their sizes and header hashes.
    :func:`~ckptdiff.exports.apply_patch` applies it.

    Parameters
    ----------
    run : RunFile
    target : path-like
        A name in ``.safetensors``.
    names : sequence of str
        Tensor names or globs; none stands for all.
    tuned : path-like, optional
        Where the tuned checkpoint is now; the norms of what is read must be those of the run.
    stream : bool
        Whether a model of the hub is read where it is; else it is downloaded first.
    listener : callable, optional
        Told of the stage "exporting".

    Returns
    -------
    int
        How many tensors the patch changes.

    Raises
    ------
    OptionError
        Another suffix, a name that no mask has, or a tensor whose elements are smaller than a byte.
    CheckpointError
        The tuned checkpoint is not what the run compared, by headers or by norms, or changes while it is read.
    RunFileError
        The run holds no masks or is damaged; the target cannot be written, or is there and no patch.

    Examples
    --------
    >>> import ckptdiff
    >>> from ckptdiff.exports import export_patch
    >>> with ckptdiff.RunFile("run.h5") as run:
    ...     export_patch(run, "patch.safetensors", names=["*.mlp.*"])
    12
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise OptionError("unknown format of a patch", expected="a name in .safetensors", found=target)
    masks = [run.masks[name] for name in chosen_masks(run, names)]
    checkpoint = open_side(run, "tuned", tuned, stream)
    diff = run.load()
    facts_of = {facts.name: facts for facts in diff.tensors}
    for mask in masks:
        if mask.count and not facts_of[mask.name].plain:
            raise OptionError(
                "a patch replaces values where they are stored, and these are stored in another way on the other side",
                file=run.path,
                tensor=mask.name,
                expected="a whole tensor on either side, in one layout and not quantised",
                hint="compare with --values codes, or checkpoints in one layout; or name other tensors",
            )
    tuned_names = {facts.name: facts.tuned_name or facts.name for facts in diff.tensors}
    # At its old place it has not been modified since.
    known = known_norms(diff, "tuned") if tuned else {}
    changed = [(mask, checkpoint.tensors[tuned_names[mask.name]]) for mask in masks if mask.count]
    check_folder(target)
    if target.exists() and not (target.is_file() and is_safetensors_of(target, PATCH_FORMAT)):
        raise RunFileError("the output exists and is no patch", file=target, hint="remove it, or choose another name")
    chunks = 2 * sum(mask_chunks(mask.numel) for mask, _ in changed)  # read for the indices, and for the values
    with stage(listener, "exporting", chunks) as told, StagedFile(target) as staged:
        with open_shards("pread") as shards:
            entries = [entry for mask, tensor in changed for entry in _entries(mask, tensor, shards, known, told)]
            write_safetensors(staged, entries, _metadata(run, [mask for mask, _ in changed]))
        staged.commit()
    return len(changed)


def missing_from_patch(run: RunFile, names: Sequence[str] = ()) -> tuple[int, int, int]:
    """Count what the tuned checkpoint holds beside the base and a patch of this run.

    Parameters
    ----------
    run : RunFile
    names : sequence of str
        As for `export_patch`.

    Returns
    -------
    changed : int
        Coordinates of the chosen tensors that changed, as stored, and are in no mask.
    tensors : int
        Tensors that only the tuned side has, or has in another shape.
    retyped : int
        Changed tensors that the base stores in another dtype: `apply_patch` refuses them.

    Raises
    ------
    OptionError
        A name that no mask has.
    RunFileError
        The run holds no masks or is damaged.

    Examples
    --------
    >>> import ckptdiff
    >>> from ckptdiff.exports import missing_from_patch
    >>> with ckptdiff.RunFile("run.h5") as run:
    ...     missing_from_patch(run)
    (4256, 0, 0)
    """
    diff, chosen = run.load(), set(chosen_masks(run, names))
    columns = diff.columns
    equal = np.where(columns["wide"].astype(bool), columns["unchanged_stored"], columns["unchanged_bitwise"])
    # Masks by percentage may hold more coordinates than have changed.
    left = np.maximum(
        columns["numel"].astype(np.int64) - equal.astype(np.int64) - columns["changed"].astype(np.int64), 0
    )
    rows = [row for row, facts in enumerate(diff.tensors) if facts.name in chosen]
    retyped = [
        row for row in rows if columns["changed"][row] and diff.tensors[row].dtype_base != diff.tensors[row].dtype_tuned
    ]
    return int(left[rows].sum()), len(diff.only_in_tuned) + len(diff.mismatched), len(retyped)


def _metadata(run: RunFile, masks: Sequence[Mask]) -> dict[str, str]:
    return {
        "format": PATCH_FORMAT,
        "rule": str(run.masks.rule),
        "compare": run.masks.compare,
        "shapes": json.dumps({mask.name: mask.shape for mask in masks}),
        "base": json.dumps(_shards(run, "base")),
        "tuned": json.dumps(_shards(run, "tuned")),
    }


def _shards(run: RunFile, side: str) -> list[dict[str, Any]]:
    """Name, size and header hash of each shard of a side."""
    return [
        {"file": os.path.basename(shard["file"]), "size": shard["size"], "header_sha256": shard["header_sha256"]}  # noqa: PTH119
        for shard in run.provenance[side]["shards"]
    ]


def _entries(
    mask: Mask, tensor: TensorInfo, shards: OpenShards, known: Mapping[str, KnownNorm], told: Stage
) -> Iterator[Entry]:
    if DTYPES[tensor.dtype].bits % 8:
        raise OptionError(
            "elements smaller than a byte cannot be patched", tensor=mask.name, found=tensor.dtype, hint="leave it out"
        )
    index = "I64" if mask.index_dtype == np.int64 else "I32"
    values = partial(_values, mask, tensor, shards, known.get(mask.name), told)
    yield Entry(f"{mask.name}.indices", index, (mask.count,), partial(_indices, mask, told))
    yield Entry(f"{mask.name}.values", tensor.dtype, (mask.count,), values)


def _indices(mask: Mask, told: Stage) -> Iterator[bytes]:
    for piece in mask.iter_flat():
        yield piece.astype(piece.dtype.newbyteorder("<"), copy=False).tobytes()
        told.more(1, mask.name)


def _values(
    mask: Mask, tensor: TensorInfo, shards: OpenShards, known: KnownNorm | None, told: Stage
) -> Iterator[bytes]:
    size = DTYPES[tensor.dtype].bits // 8
    for bits, stored in zip(mask.iter_packed(BLOCK // 8), checked_blocks(shards, tensor, known), strict=True):
        elements = stored.reshape(-1, size)
        yield elements[np.unpackbits(bits, bitorder=BIT_ORDER, count=len(elements)).view(np.bool_)].tobytes()
        told.more(1, mask.name)
