"""Write a SHiRA adapter (Bhardwaj et al., arXiv 2406.13175) of the largest changes, for PEFT."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint import Checkpoint, TensorInfo
from ckptdiff.checkpoint.blocks import values_of
from ckptdiff.checkpoint.globs import names_of
from ckptdiff.checkpoint.open_shards import OpenShards, open_shards
from ckptdiff.errors import OptionError, first_few
from ckptdiff.events import Listener, Stage, stage
from ckptdiff.exports.adaptable import Adapted
from ckptdiff.figures.result import Diff, TensorFacts
from ckptdiff.files.staged import StagedFile, StagedFolder, write_whole
from ckptdiff.measure.partial import BLOCK
from ckptdiff.options import as_tuple
from ckptdiff.runfile.check_target import check_new
from ckptdiff.runfile.identity import KnownNorm, checked_blocks, known_norms, open_side
from ckptdiff.runfile.reader import RunFile
from ckptdiff.runfile.safetensors_file import Entry, write_safetensors

_Side: TypeAlias = tuple[TensorInfo, KnownNorm | None]


@dataclass(frozen=True, slots=True)
class ShiraExport:
    """An adapter that was written.

    Attributes
    ----------
    layers : int
        Matrices it changes.
    coordinates : int
        How many of their coordinates.
    energy : float
        Share of those matrices' sum d^2 that it keeps.
    whole : float
        Share of the sum d^2 of all tensors that the run compared that it keeps.
    left_out : tuple of LeftOut
        Tensors that changed and are not in it, those with the largest shares first.
    """

    layers: int
    coordinates: int
    energy: float
    whole: float
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A tensor that an adapter leaves out.

    Attributes
    ----------
    name : str
    share : float
        Of the sum d^2 of all tensors.
    reason : str

    Examples
    --------
    >>> from ckptdiff.exports import LeftOut
    >>> LeftOut("model.norm.weight", 0.01, "a vector").reason
    'a vector'
    """

    name: str
    share: float
    reason: str


@dataclass(frozen=True, slots=True)
class _Largest:
    indices: NDArray[np.int64]
    deltas: NDArray[np.float32]
    kept: float
    total: float


def export_shira(
    run: RunFile,
    target: str | os.PathLike[str],
    *,
    rank: int,
    names: Sequence[str] = (),
    base: str | os.PathLike[str] | None = None,
    tuned: str | os.PathLike[str] | None = None,
    stream: bool = False,
    listener: Listener | None = None,
) -> ShiraExport:
    """Write a folder that ``PeftModel.from_pretrained`` loads onto the base model.

    Of each m x n matrix it takes the ``rank * (m + n)`` largest changes (SHiRA holds exactly that many), in the mask or
    not; ties go to the smaller index. Values are the differences in float32.

    Parameters
    ----------
    run : RunFile
        It need not hold masks.
    target : path-like
        A folder to be made.
    rank : int
    names : sequence of str
        Tensor names or globs of weights of linear layers; none stands for all that PEFT can adapt: no embeddings, no
        routers, and no experts, which SHiRA has no layer for where a model has fused them.
    base, tuned : path-like, optional
        Where the checkpoints are now; the norms of what is read must be those of the run.
    stream : bool
        Whether models of the hub are read where they are; else they are downloaded first.
    listener : callable, optional
        Told of the stage "exporting", in bytes that are read.

    Returns
    -------
    ShiraExport

    Raises
    ------
    OptionError
        No matrix of that name, a tensor that is not the weight of a linear layer (embeddings and GPT-2's Conv1D are
        none to PEFT), a rank that a matrix cannot meet (``rank * (m + n)`` exceeds its m n coordinates), or matrices
        of which none changed.
    CheckpointError
        A checkpoint is not what the run compared, by headers or by norms, or changes while it is read.
    RunFileError
        The run is damaged, or the target exists or cannot be written.

    Examples
    --------
    >>> import ckptdiff
    >>> from ckptdiff.exports import export_shira
    >>> with ckptdiff.RunFile("run.h5") as run:
    ...     export_shira(run, "shira", rank=2, names=["*.mlp.*"]).layers
    12
    """
    target = Path(target)
    diff = run.load()
    names = as_tuple("names", names)
    sides = open_side(run, "base", base, stream), open_side(run, "tuned", tuned, stream)
    weights = ((one.name, one.shape) for one in diff.tensors)
    model = Adapted.of(sides[0].shards[0].path, weights)
    chosen, reasons = _chosen(diff.tensors, names, rank, model, run.path)
    for facts in chosen:
        _require_rank(facts, rank, run.path)
    check_new(target)
    # At their old places they have not been modified since.
    known = known_norms(diff, "base") if base else {}, known_norms(diff, "tuned") if tuned else {}
    entries: list[Entry] = []
    found: list[_Largest] = []
    pairs = [
        (
            (sides[0].tensors[facts.name], known[0].get(facts.name)),
            (sides[1].tensors[facts.tuned_name or facts.name], known[1].get(facts.name)),
        )
        for facts in chosen
    ]
    nbytes = sum(tensor.nbytes for pair in pairs for tensor, _ in pair)
    with open_shards("pread") as shards, stage(listener, "exporting", nbytes, "bytes") as told:
        for facts, pair in zip(chosen, pairs, strict=True):
            largest = _largest_changes(shards, *pair, rank * sum(facts.shape), told)
            found.append(largest)
            entries += _entries(model.called(facts.name).removesuffix(".weight"), facts.shape[1], largest)
    total = sum(largest.total for largest in found)
    if not total:
        raise OptionError(
            "an adapter would change nothing",
            file=run.path,
            expected="some change in the matrices that it adapts",
            found=f"none in {first_few(facts.name for facts in chosen)}",
            hint="name other matrices, or compare other checkpoints",
        )
    modules = [model.called(facts.name).removesuffix(".weight") for facts in chosen]
    text = json.dumps(_config(modules, rank, sides[0]), indent=2, sort_keys=True) + "\n"
    with StagedFolder(target) as made:
        with StagedFile(made.path / "adapter_model.safetensors") as staged:
            write_safetensors(staged, entries, {"format": "pt"})
            staged.commit()
        write_whole(made.path / "adapter_config.json", text.encode())
        made.commit()
    kept = sum(largest.kept for largest in found)
    others = {facts.name: norm**2 for facts, norm in zip(diff.tensors, _norms(diff), strict=True) if norm > 0}
    for facts in chosen:
        others.pop(facts.name, None)
    whole = total + sum(others.values())
    left = (LeftOut(name, energy / whole, reasons[name]) for name, energy in others.items())
    return ShiraExport(
        layers=len(found),
        coordinates=sum(largest.indices.size for largest in found),
        energy=kept / total,
        whole=kept / whole,
        left_out=tuple(sorted(left, key=lambda one: -one.share)),
    )


def _norms(diff: Diff) -> list[float]:
    """Norms of updates as they are stored, or in older runs as they were compared."""
    columns = diff.columns
    found: list[float] = columns["stored_norm" if "stored_norm" in columns else "delta_norm"].tolist()
    return found


def _chosen(
    tensors: Sequence[TensorFacts], names: Sequence[str], rank: int, model: Adapted, path: str
) -> tuple[list[TensorFacts], dict[str, str]]:
    """The tensors to adapt, and why the others are not."""
    found = names_of(names, [facts.name for facts in tensors])
    unknown = [name for name, matches in found.items() if not matches]
    wanted = set(chain.from_iterable(found.values()))
    reasons = {facts.name: _reason(facts, model) for facts in tensors}
    if not names:
        small = {facts.name for facts in tensors if reasons[facts.name] is None and not _holds(facts, rank)}
        # Where no matrix is large enough, the error names the first.
        if sum(reason is None for reason in reasons.values()) > len(small):
            reasons |= dict.fromkeys(small, f"too small for rank {rank}")
        wanted = {name for name, reason in reasons.items() if reason is None}
    chosen = [facts for facts in tensors if facts.name in wanted]
    if unknown or not chosen:
        raise OptionError(
            "no matrix of that name" if names else "the run compared no matrix that PEFT's SHiRA can adapt",
            file=path,
            found=", ".join(unknown) or first_few(f"{name}: {reason}" for name, reason in reasons.items()),
            hint="ckptdiff show --by tensor lists the names",
        )
    for facts in chosen:
        reason = reasons[facts.name]
        hint = "--layout patch holds the changes of any tensor"
        if not facts.plain:
            hint = "save both checkpoints in one layout, and not quantised"
        if reason is not None:
            raise OptionError(
                "PEFT's SHiRA adapts the weights of linear layers only",
                file=path,
                tensor=facts.name,
                expected="a floating matrix named *.weight, of a torch.nn.Linear",
                found=f"{facts.dtype_base} of shape {facts.shape}: {reason}",
                hint=hint,
            )
    return chosen, {name: reason or "not named" for name, reason in reasons.items()}


def _reason(facts: TensorFacts, model: Adapted) -> str | None:
    """Why a tensor cannot be adapted; None if it can."""
    way, reason = model.way(model.called(facts.name), facts.shape, facts.compare != "bitwise", "shira")
    if way is None:
        return reason
    return None if facts.plain else "its values are not stored in that layout on both sides"


def _holds(facts: TensorFacts, rank: int) -> bool:
    """Whether a matrix has as many coordinates as an adapter of a rank takes."""
    return 0 < rank * sum(facts.shape) <= math.prod(facts.shape)


def _require_rank(facts: TensorFacts, rank: int, path: str) -> None:
    m, n = facts.shape
    if not _holds(facts, rank):
        raise OptionError(
            "this rank cannot be met",
            file=path,
            tensor=facts.name,
            expected=f"rank * (m + n) coordinates of {m} x {n}: a rank from 1 to {m * n // max(m + n, 1)}",
            found=f"rank {rank}",
            hint="a smaller --rank, or name larger matrices only",
        )


def _largest_changes(shards: OpenShards, base: _Side, tuned: _Side, count: int, told: Stage) -> _Largest:
    """The `count` largest changes, in ascending order of their index; NaN counts as nothing."""
    sides = zip(checked_blocks(shards, *base), checked_blocks(shards, *tuned), strict=True)
    indices, deltas = np.empty(0, np.int64), np.empty(0, np.float32)
    total, cut = 0.0, np.float32(-1)
    for block, (left, right) in enumerate(sides):
        delta = np.nan_to_num(values_of(tuned[0].dtype, right) - values_of(base[0].dtype, left), posinf=0, neginf=0)
        total += float(np.square(delta, dtype=np.float64).sum())
        # Later coordinates of the same size lose to earlier ones, so only larger ones can still get in.
        found = np.flatnonzero(np.abs(delta) > cut)
        indices = np.concatenate([indices, found + block * BLOCK])
        deltas = np.concatenate([deltas, delta[found].astype(np.float32)])
        if indices.size > count:
            order = np.argsort(-np.abs(deltas), kind="stable")[:count]
            cut = np.abs(deltas[order[-1]])
            order.sort()
            indices, deltas = indices[order], deltas[order]
        told.more(left.nbytes + right.nbytes, base[0].name)
    return _Largest(indices, deltas, float(np.square(deltas, dtype=np.float64).sum()), total)


def _entries(module: str, columns: int, largest: _Largest) -> list[Entry]:
    prefix = f"base_model.model.{module}"
    rows = np.stack(np.divmod(largest.indices, columns)).astype("<i4")
    weights = largest.deltas.astype("<f4")
    return [
        Entry(f"{prefix}.shira_indices", "I32", rows.shape, lambda: [rows.tobytes()]),
        Entry(f"{prefix}.shira_weight", "F32", weights.shape, lambda: [weights.tobytes()]),
    ]


def _config(modules: list[str], rank: int, base: Checkpoint) -> dict[str, Any]:
    return {
        "peft_type": "SHIRA",
        "base_model_name_or_path": base.path,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": True,
        "mask_type": "random",
        "modules_to_save": None,
        "r": rank,
        "random_seed": None,
        "revision": None,
        "target_modules": modules,
        "task_type": None,
    }
