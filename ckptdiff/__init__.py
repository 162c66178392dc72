"""A streaming diff for safetensors checkpoints, which tells what post-training really changed in a model.

>>> import ckptdiff
>>> run = ckptdiff.diff("fixtures/llama/base", "fixtures/llama/tuned")
>>> round(run.overall["unchanged_bitwise"], 4)
0.7817

Other verbs have rooms of their own, each with its public names: :mod:`ckptdiff.overlap`, :mod:`ckptdiff.track`,
:mod:`ckptdiff.lora`, :mod:`ckptdiff.exports`, :mod:`ckptdiff.spectra`, :mod:`ckptdiff.claims` and
:mod:`ckptdiff.retrain`, which needs torch. Every error that is raised on purpose is a :class:`CkptdiffError`;
:mod:`ckptdiff.errors` draws their tree.

Importing the package loads no numerical library; the first use of a name, or of a room, does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from ckptdiff.api import diff
    from ckptdiff.checkpoint import Checkpoint, TensorInfo, open_checkpoint
    from ckptdiff.errors import (
        ChangedFileError,
        CheckpointError,
        CkptdiffError,
        ClusterError,
        DeviceError,
        HeaderError,
        IndexFileError,
        MaskError,
        OptionError,
        PairingError,
        PatchError,
        PlanError,
        RunFileError,
    )
    from ckptdiff.figures.result import Diff, TensorFacts
    from ckptdiff.options import MaskRule, Options, SpectraOptions, parse_size
    from ckptdiff.runfile.mask import Mask
    from ckptdiff.runfile.reader import RunFile

__all__ = [
    "ChangedFileError",
    "Checkpoint",
    "CheckpointError",
    "CkptdiffError",
    "ClusterError",
    "DeviceError",
    "Diff",
    "HeaderError",
    "IndexFileError",
    "Mask",
    "MaskError",
    "MaskRule",
    "OptionError",
    "Options",
    "PairingError",
    "PatchError",
    "PlanError",
    "RunFile",
    "RunFileError",
    "SpectraOptions",
    "TensorFacts",
    "TensorInfo",
    "__version__",
    "diff",
    "open_checkpoint",
    "parse_size",
]

_HOME = {
    "ChangedFileError": "ckptdiff.errors",
    "Checkpoint": "ckptdiff.checkpoint",
    "CheckpointError": "ckptdiff.errors",
    "CkptdiffError": "ckptdiff.errors",
    "ClusterError": "ckptdiff.errors",
    "DeviceError": "ckptdiff.errors",
    "Diff": "ckptdiff.figures.result",
    "HeaderError": "ckptdiff.errors",
    "IndexFileError": "ckptdiff.errors",
    "Mask": "ckptdiff.runfile.mask",
    "MaskError": "ckptdiff.errors",
    "MaskRule": "ckptdiff.options",
    "OptionError": "ckptdiff.errors",
    "Options": "ckptdiff.options",
    "PairingError": "ckptdiff.errors",
    "PatchError": "ckptdiff.errors",
    "PlanError": "ckptdiff.errors",
    "RunFile": "ckptdiff.runfile.reader",
    "RunFileError": "ckptdiff.errors",
    "SpectraOptions": "ckptdiff.options",
    "TensorFacts": "ckptdiff.figures.result",
    "TensorInfo": "ckptdiff.checkpoint",
    "diff": "ckptdiff.api",
    "open_checkpoint": "ckptdiff.checkpoint",
    "parse_size": "ckptdiff.options",
}

_ROOMS = ("claims", "exports", "lora", "overlap", "patch", "retrain", "spectra", "track")
"""Packages that ``import ckptdiff`` alone reaches."""


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, *_ROOMS]
