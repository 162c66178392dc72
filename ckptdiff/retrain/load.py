"""From a run file and a model to the masks of its parameters."""

from __future__ import annotations

import os
import re

import numpy as np
from torch.nn import Module, Parameter

from ckptdiff.checkpoint.matching import match_names
from ckptdiff.errors import MaskError, first_few
from ckptdiff.retrain.packed import PackedMask
from ckptdiff.retrain.parameters import MatchReport, ParameterMasks
from ckptdiff.runfile.mask import Mask
from ckptdiff.runfile.reader import RunFile

__all__ = ["load_masks"]

# PEFT moves the layer it adapts one level down, and keeps a trainable copy of modules it saves.
_PEFT = re.compile(r"\.base_layer(?=\.)|\.modules_to_save\.[^.]+(?=\.)")
_PEFT_ORIGINAL = re.compile(r"\.original_module\.")


def load_masks(run_file: str | os.PathLike[str] | RunFile, model: Module, *, strict: bool = True) -> ParameterMasks:
    """Read the masks of a run file for the parameters of a model.

    Names are matched as ``ckptdiff diff`` matches them: exactly, then without the prefixes of DDP, FSDP, torch.compile,
    activation checkpointing and PEFT, where that is unique. A parameter with two names (tied weights) is found by
    either of them. Of a tensor that the run did not mask, nothing is trained.

    Parameters
    ----------
    run_file : path-like or RunFile
    model : Module
        Its parameters must have their whole shapes. With FSDP2, load the masks after ``fully_shard``, which makes new
        parameters; the flat ones of FSDP1 fit no mask once there are several ranks.
    strict : bool
        Refuse masks without a parameter, and trainable parameters without a mask. Otherwise both are listed in the
        ``report`` of the result.

    Returns
    -------
    ParameterMasks
        Packed, one bit per coordinate, in memory.

    Raises
    ------
    MaskError
        A mask of another shape than its parameter; two different masks of one tied parameter; nothing that matches,
        or with `strict` anything that does not; no coordinate in any mask.
    RunFileError
        The run file cannot be read, or holds no masks.
    """
    if not isinstance(run_file, RunFile):
        with RunFile(run_file) as run:
            return load_masks(run, model, strict=strict)
    run_file.require_masks()
    parameters = _parameters(model)
    buffers = {name for name, _ in model.named_buffers()} - parameters.keys()
    matched, warnings = match_names(run_file.masks, [*parameters, *buffers])
    masks: dict[Parameter, PackedMask] = {}
    for name, bare in matched.items():
        if bare in parameters:
            full_name, parameter = parameters[bare]
            mask = _read(run_file.masks[name], full_name, parameter, run_file.path)
            _require_same(masks.setdefault(parameter, mask), mask, name, run_file.path)
    names: dict[Parameter, str] = {}
    for full_name, parameter in parameters.values():
        names.setdefault(parameter, full_name)
    report = MatchReport(
        matched={name: parameters[bare][0] for name, bare in matched.items() if bare in parameters},
        unused_masks=tuple(name for name in run_file.masks if name not in matched),
        unmasked_parameters=tuple(n for p, n in names.items() if p.requires_grad and p not in masks),
        buffers=tuple(name for name, bare in matched.items() if bare in buffers),
        warnings=warnings,
    )
    found = ParameterMasks(masks, names, report)
    _require_useful(found, strict, run_file.path)
    return found


def _parameters(model: Module) -> dict[str, tuple[str, Parameter]]:
    """Full name and parameter by the name without what PEFT adds to it; tied ones by each of their names."""
    return {
        _PEFT.sub("", name): (name, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not _PEFT_ORIGINAL.search(name)
    }


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
            hint="check that the run compared checkpoints of this model",
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
