"""What did post-training really change in this model? A streaming diff for safetensors checkpoints.

>>> import ckptdiff
>>> run = ckptdiff.diff("fixtures/llama/base", "fixtures/llama/tuned")
>>> round(run.overall["unchanged_bitwise"], 4)
0.7817

Importing the package loads no numerical library; the first use of a name does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ckptdiff.api import diff
    from ckptdiff.checkpoint import Checkpoint, TensorInfo, open_checkpoint
    from ckptdiff.errors import CkptdiffError
    from ckptdiff.figures.result import Diff, TensorFacts
    from ckptdiff.options import MaskRule, Options
    from ckptdiff.runfile.mask import Mask
    from ckptdiff.runfile.reader import RunFile

__all__ = [
    "Checkpoint",
    "CkptdiffError",
    "Diff",
    "Mask",
    "MaskRule",
    "Options",
    "RunFile",
    "TensorFacts",
    "TensorInfo",
    "__version__",
    "diff",
    "open_checkpoint",
]

_HOME = {
    "Checkpoint": "ckptdiff.checkpoint",
    "CkptdiffError": "ckptdiff.errors",
    "Diff": "ckptdiff.figures.result",
    "Mask": "ckptdiff.runfile.mask",
    "MaskRule": "ckptdiff.options",
    "Options": "ckptdiff.options",
    "RunFile": "ckptdiff.runfile.reader",
    "TensorFacts": "ckptdiff.figures.result",
    "TensorInfo": "ckptdiff.checkpoint",
    "diff": "ckptdiff.api",
    "open_checkpoint": "ckptdiff.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
