"""Keep everything outside the masks as it is, under any torch optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ckptdiff.errors import MaskError
from ckptdiff.retrain.packed import PackedMask

__all__ = ["Freezing", "freeze_outside", "mask_gradients"]


class Freezing:
    """Hooks that are in place until :meth:`remove`; also a context manager."""

    def __init__(self, hooks: list[Any]) -> None:
        self._hooks = hooks

    def remove(self) -> None:
        """Take the hooks away; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> Freezing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def mask_gradients(masks: Mapping[Any, PackedMask]) -> Freezing:
    """Set gradients to zero outside the masks, as soon as each is complete.

    Whatever looks at gradients afterwards, clipping included, sees masked ones. The booleans take one byte per
    coordinate, on the parameter's device.

    Parameters
    ----------
    masks : mapping of Parameter to PackedMask
    """
    hooks = [_gradient_hook(p, _outside(mask, p)) for p, mask in masks.items() if p.requires_grad]
    return Freezing(hooks)


def freeze_outside(optimizer: torch.optim.Optimizer, masks: Mapping[Any, PackedMask]) -> Freezing:
    """Let any torch optimizer train the masked coordinates only, and keep every bit of the others.

    Gradients are set to zero outside the masks when they are accumulated and again before each step, and after the step
    what lies outside is put back, because weight decay and momentum move it too (S1 does the same). Parameters of the
    optimizer without a mask are frozen whole. A step takes a copy of all parameters while it runs; the state of the
    optimizer stays dense: :class:`~ckptdiff.retrain.MaskedAdamW` needs neither.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Also one that shards its parameters with DTensor.
    masks : mapping of Parameter to PackedMask

    Returns
    -------
    Freezing
        Holds the hooks; its ``remove`` ends it.

    Raises
    ------
    MaskError
        If no parameter of the optimizer has a masked coordinate.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(parameter in masks and masks[parameter].count for parameter in parameters):
        raise MaskError(
            "no parameter of the optimizer has a masked coordinate: there is nothing to train",
            expected=f"some of the {len(masks)} masked parameters",
            found="none of them, or empty masks",
            hint="load the masks of the parameters that the optimizer has: after fully_shard, which makes new ones",
        )
    outside = {p: _outside(masks[p], p) if p in masks else None for p in parameters}
    before: dict[Any, Tensor] = {}

    @torch.no_grad()
    def remember(*_: Any) -> None:
        for parameter, frozen in outside.items():
            if frozen is None:
                parameter.grad = None  # so that no state is made for it
            else:
                _zero_gradient(frozen, parameter)
            before[parameter] = parameter.detach().clone()

    @torch.no_grad()
    def restore(*_: Any) -> None:
        for parameter, frozen in outside.items():
            start = before.pop(parameter)
            # One without a mask has moved too if the step took a closure, which brings gradients of zero back.
            parameter.copy_(start if frozen is None else torch.where(frozen, start, parameter))

    hooks = [_gradient_hook(parameter, frozen) for parameter, frozen in outside.items() if parameter.requires_grad]
    hooks += [optimizer.register_step_pre_hook(remember), optimizer.register_step_post_hook(restore)]
    return Freezing(hooks)


def _gradient_hook(parameter: Any, outside: Tensor | None) -> Any:
    return parameter.register_post_accumulate_grad_hook(partial(_zero_gradient, outside))


def _zero_gradient(outside: Tensor | None, parameter: Any) -> None:
    """In place, since the gradient may be a view of a bucket of DDP."""
    if parameter.grad is not None and outside is None:
        parameter.grad.zero_()
    elif parameter.grad is not None:
        parameter.grad.masked_fill_(outside, 0.0)


def _outside(mask: PackedMask, parameter: Any) -> Tensor:
    if mask.shape != tuple(parameter.shape):
        raise MaskError(
            "a mask does not fit its parameter",
            expected=f"a mask of shape {tuple(parameter.shape)}",
            found=mask.shape,
        )
    dense = torch.from_numpy(mask.inverted().dense())
    if not hasattr(parameter, "placements"):
        return dense.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    mesh = parameter.device_mesh
    return distribute_tensor(dense.to(mesh.device_type), mesh, parameter.placements)
