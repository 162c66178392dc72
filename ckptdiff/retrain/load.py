"""Load the masks of a run file for the parameters of a model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from torch.nn import Module, Parameter

from ckptdiff.checkpoint.matching import match_names
from ckptdiff.errors import MaskError, OptionError, first_few
from ckptdiff.retrain.packed import PackedMask
from ckptdiff.retrain.parameters import MatchReport, ParameterMasks
from ckptdiff.runfile.mask import Mask
from ckptdiff.runfile.reader import RunFile

# PEFT moves the layer it adapts one level down, and keeps a trainable copy of modules it saves.
_PEFT = re.compile(r"\.base_layer(?=\.)|\.modules_to_save\.[^.]+(?=\.)")
_PEFT_ORIGINAL = re.compile(r"\.original_module\.")

Copies: TypeAlias = list[tuple[str, Parameter]]
"""Name in the model and parameter, of one name in the run."""


def load_masks(
    run_file: str | os.PathLike[str] | RunFile,
    model: Module,
    *,
    strict: bool = True,
    names: Literal["base", "tuned"] = "base",
) -> ParameterMasks:
    """Read the masks of a run file for the parameters of a model.

    Names are matched as ``ckptdiff diff`` matches them: exactly, then without the prefixes of DDP, FSDP, torch.compile,
    activation checkpointing and PEFT, where that is unique, and then without what PEFT puts inside a name. A parameter
    with two names (tied weights) is found by either of them; each copy that PEFT keeps of a module gets its mask. Of a
    tensor that the run did not mask, nothing is trained.

    Parameters
    ----------
    run_file : path-like or RunFile
    model : Module
        Its parameters must have their whole shapes. With FSDP2, load the masks after ``fully_shard``, which makes new
        parameters; the flat ones of FSDP1 fit no mask once there are several ranks.
    strict : bool
        Refuse masks without a parameter, and trainable parameters without a mask. Otherwise both are listed in the
        ``report`` of the result.
    names : {"base", "tuned"}
        Which side's names the model has; they differ in a run with ``--map``.

    Returns
    -------
    ParameterMasks
        Packed, one bit per coordinate, in memory.

    Raises
    ------
    MaskError
        A mask of another shape than its parameter; two different masks of one tied parameter; nothing that matches,
        or with `strict` anything that does not; no coordinate in any mask, or in none of a parameter that is trained.
    OptionError
        `names` is neither side.
    RunFileError
        The run file cannot be read, or holds no masks.

    Examples
    --------
    >>> from ckptdiff.retrain import load_masks
    >>> masks = load_masks("run.h5", model)
    >>> masks.report.complete
    True
    """
    if not isinstance(run_file, RunFile):
        with RunFile(run_file) as run:
            return load_masks(run, model, strict=strict, names=names)
    run_file.require_masks()
    stored = _names_in(run_file, names)
    found = _match(stored, model)
    masks: dict[Parameter, PackedMask] = {}
    known: dict[Parameter, str] = {}
    for name, copies in found.copies.items():
        for full_name, parameter in copies:
            mask = _read(run_file.masks[name], full_name, parameter, run_file.path)
            _require_same(masks.setdefault(parameter, mask), mask, name, run_file.path)
            known.setdefault(parameter, name)
    trained = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    report = MatchReport(
        matched={name: _trained_one(copies) for name, copies in found.copies.items()},
        unused_masks=tuple(name for name in run_file.masks if name not in found.copies and name not in found.buffers),
        unmasked_parameters=tuple(name for parameter, name in trained.items() if parameter not in masks),
        frozen=tuple(name for name, copies in found.copies.items() if not any(p in trained for _, p in copies)),
        buffers=found.buffers,
        warnings=found.warnings,
    )
    result = ParameterMasks(masks, known, report)
    _require_useful(result, strict, run_file.path)
    return result


@dataclass(frozen=True, slots=True)
class _Matches:
    """Parameters and buffers of a model that have a mask, by their names in the run file."""

    copies: dict[str, Copies]
    buffers: tuple[str, ...]
    warnings: tuple[str, ...]


def _match(stored: Mapping[str, str], model: Module) -> _Matches:
    """Find the parameters of each name, whose name in the run file is `stored`."""
    parameters = {name: [(name, p)] for name, p in model.named_parameters(remove_duplicate=False)}
    buffers = {name for name, _ in model.named_buffers()} - parameters.keys()
    matched, warnings = match_names(stored, [*parameters, *buffers])
    # A name of the model's own may look like one of PEFT's: those that match as they are come first.
    taken = {*matched.values()}
    inside = _without_peft({name: copies for name, copies in parameters.items() if name not in taken})
    inner, more = match_names((name for name in stored if name not in matched), inside)
    outer = {stored[name]: parameters[found] for name, found in matched.items() if found in parameters}
    return _Matches(
        copies={**outer, **{stored[name]: inside[found] for name, found in inner.items()}},
        buffers=tuple(stored[name] for name, found in matched.items() if found in buffers),
        warnings=tuple(dict.fromkeys((*warnings, *more))),
    )


def _names_in(run: RunFile, side: str) -> dict[str, str]:
    """Name on a side of each masked tensor, and its name in the run file."""
    if side not in ("base", "tuned"):
        raise OptionError("unknown side", expected="names of the base or of the tuned side", found=side)
    facts = run.load().tensors if side == "tuned" else ()
    other = {facts.name: facts.tuned_name or facts.name for facts in facts}
    return {other.get(name, name): name for name in run.masks}


def _without_peft(parameters: Mapping[str, Copies]) -> dict[str, Copies]:
    """Parameters by the name without what PEFT puts inside it."""
    found: dict[str, Copies] = {}
    for name, copies in parameters.items():
        if not _PEFT_ORIGINAL.search(name):
            found.setdefault(_PEFT.sub("", name), []).extend(copies)
    return found


def _trained_one(copies: Copies) -> str:
    """The name of the copy that is trained, if any is, else of the first."""
    return next((name for name, parameter in copies if parameter.requires_grad), copies[0][0])


def _read(mask: Mask, name: str, parameter: Parameter, path: str) -> PackedMask:
    if mask.shape != tuple(parameter.shape):
        raise MaskError(
            "a mask does not fit its parameter",
            file=path,
            tensor=mask.name,
            expected=f"shape {tuple(parameter.shape)} of {name}",
            found=f"shape {mask.shape}",
            hint="load masks into the model whose checkpoints were compared; of FSDP, only fully_shard keeps shapes",
        )
    return PackedMask(mask.shape, mask.packed())


def _require_same(first: PackedMask, mask: PackedMask, name: str, path: str) -> None:
    if not np.array_equal(first.bits, mask.bits):
        raise MaskError(
            "two different masks for one tied parameter",
            file=path,
            tensor=name,
            expected=f"{first.count} coordinates, as under its other name",
            found=f"{mask.count} coordinates, or others",
            hint="untie the weights, or compare the checkpoints with --exclude for one of the names",
        )


def _require_useful(masks: ParameterMasks, strict: bool, path: str) -> None:
    report = masks.report
    if not masks:
        raise MaskError(
            "no mask of the run file fits a parameter of the model",
            file=path,
            expected=first_few(report.unmasked_parameters) or "none",
            found=first_few(report.unused_masks) or "none",
            hint="check that the run compared checkpoints of this model; names='tuned' goes by the other side's names",
        )
    if strict and not report.complete:
        raise MaskError(
            "the masks and the model's parameters do not match",
            file=path,
            expected="a parameter for each mask, and a mask for each trainable parameter",
            found=str(report),
            hint="strict=False trains what matches, and leaves the rest as it is",
        )
    if not masks.count:
        raise MaskError(
            "the masks are empty: there is nothing to train",
            file=path,
            found="no coordinate in any mask",
            hint="compare with a rule that selects more, such as --mask bitwise",
        )
    if not any(mask.count for parameter, mask in masks.items() if parameter.requires_grad):
        raise MaskError(
            "no masked parameter is trained: there is nothing to train",
            file=path,
            expected="requires_grad of some parameter with coordinates in its mask",
            found=str(report),
            hint="PEFT freezes what it adapts: load masks into the bare model, or set requires_grad first",
        )
