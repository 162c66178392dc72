"""Step, with torch's own code, what the compiled kernels do not serve: gather, step, scatter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ckptdiff.retrain.support import NARROW, IndexSupport, Masked

Moving: TypeAlias = tuple[Tensor, Masked, dict[str, Any], bool]
"""A parameter that a step moves, its state, and whether a slot of that is new."""


def step_indexed(functional: Callable[..., None], moving: Sequence[Moving]) -> None:
    """Step the masked coordinates of parameters.

    `functional` takes values and gradients, lists of tensors of shape (masked,), their states, and whether these are
    new.
    """
    values, gradients = [], []
    for parameter, masked, state, _ in moving:
        index = _index(masked)
        found = parameter.reshape(-1)[index]
        wide = found.float() if parameter.dtype in NARROW else found
        if "master" in state:
            wide = torch.where(state["master"].to(found.dtype) == found, state["master"], wide)
        values.append(wide)
        gradients.append(parameter.grad.reshape(-1)[index].to(wide.dtype))
    functional(values, gradients, [state for *_, state, _ in moving], [new for *_, new in moving])
    for (parameter, masked, state, _), value in zip(moving, values, strict=True):
        if "master" in state:
            state["master"] = value
        flat = parameter.reshape(-1)
        flat[_index(masked)] = value.to(parameter.dtype)
        if flat.data_ptr() != parameter.data_ptr():  # it was not contiguous, so this is a copy
            parameter.copy_(flat.view(parameter.shape))


def _index(masked: Masked) -> Tensor:
    assert isinstance(masked.support, IndexSupport)
    return masked.support.index
