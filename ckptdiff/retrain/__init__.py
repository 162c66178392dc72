"""Train just the changed subnetwork: masks of a run file as masks of a model's parameters (needs torch).

With `model` that of the checkpoints that the run compared:

>>> from ckptdiff.retrain import MaskedAdamW, load_masks
>>> masks = load_masks("run.h5", model)
>>> optimizer = MaskedAdamW(model.parameters(), masks, lr=1e-5)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ckptdiff.errors import OptionError

if TYPE_CHECKING:
    from ckptdiff.retrain.adamw import MaskedAdamW
    from ckptdiff.retrain.callback import MaskCallback
    from ckptdiff.retrain.freezing import Freezing, freeze_outside, mask_gradients
    from ckptdiff.retrain.load import load_masks
    from ckptdiff.retrain.packed import PackedMask
    from ckptdiff.retrain.parameters import MatchReport, ParameterMasks
    from ckptdiff.retrain.sgd import MaskedSGD
    from ckptdiff.retrain.track_callback import TrackCallback

__all__ = [
    "Freezing",
    "MaskCallback",
    "MaskedAdamW",
    "MaskedSGD",
    "MatchReport",
    "PackedMask",
    "ParameterMasks",
    "TrackCallback",
    "freeze_outside",
    "load_masks",
    "mask_gradients",
]

_MODULES = {
    "Freezing": "freezing",
    "MaskCallback": "callback",
    "MaskedAdamW": "adamw",
    "MaskedSGD": "sgd",
    "MatchReport": "parameters",
    "PackedMask": "packed",
    "ParameterMasks": "parameters",
    "TrackCallback": "track_callback",
    "freeze_outside": "freezing",
    "load_masks": "load",
    "mask_gradients": "freezing",
}
"""Where names are: torch and transformers take seconds to import, and its kernels are compiled without them."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise OptionError("retraining needs torch", hint="pip install 'ckptdiff[retrain]'") from error
    found = globals()[name] = getattr(import_module(f"ckptdiff.retrain.{_MODULES[name]}"), name)
    return found
