"""Keep everything outside the masks as it is, under any torch optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ckptdiff.errors import MaskError
from ckptdiff.retrain.packed import PackedMask, require_fit
from ckptdiff.retrain.refusals import require_current, require_dense


class Freezing:
    """Hooks that are in place until :meth:`remove`; also a context manager.

    Examples
    --------
    >>> from ckptdiff.retrain import load_masks, mask_gradients
    >>> with mask_gradients(load_masks("run.h5", model)):
    ...     sum(p.square().sum() for p in model.parameters()).backward()
    """

    def __init__(self, hooks: list[Any]) -> None:
        self._hooks = hooks

    def remove(self) -> None:
        """Take the hooks away; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> Freezing:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def mask_gradients(masks: Mapping[Any, PackedMask]) -> Freezing:
    """Set gradients to zero outside the masks, as soon as each is complete.

    Whatever looks at gradients afterwards, clipping included, sees masked ones. The booleans take one byte per
    coordinate, on the parameter's device. Masks that were loaded before ``fully_shard`` do nothing: they are of
    parameters that the model no longer has.

    Parameters
    ----------
    masks : mapping of Parameter to PackedMask

    Returns
    -------
    Freezing
        Holds the hooks; its ``remove`` ends it.

    Raises
    ------
    MaskError
        A mask does not fit its parameter; while training, a sparse gradient of a parameter with a mask.

    Examples
    --------
    >>> from ckptdiff.retrain import load_masks, mask_gradients
    >>> masks = load_masks("run.h5", model)
    >>> model.zero_grad()
    >>> with mask_gradients(masks):
    ...     sum(p.square().sum() for p in model.parameters()).backward()
    >>> sum(int(p.grad.count_nonzero()) for p in model.parameters()) <= masks.count
    True
    """
    hooks = [_gradient_hook(p, _Outside.of(p, masks)) for p in masks if p.requires_grad]
    return Freezing(hooks)


def freeze_outside(optimizer: torch.optim.Optimizer, masks: Mapping[Any, PackedMask]) -> Freezing:
    """Let any torch optimizer train the masked coordinates only, and keep every bit of the others.

    Gradients are set to zero outside the masks when they are accumulated and again before each step, and after the step
    what lies outside is put back, because weight decay and momentum move it too (S1 does the same). Parameters of the
    optimizer without a mask are frozen whole. A step takes a copy of all parameters while it runs; the state of the
    optimizer stays dense: :class:`~ckptdiff.retrain.MaskedAdamW` needs neither. Parameters that the optimizer is given
    later are frozen too, by their masks or whole.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Also one of parameters that FSDP2 shards: each rank then has its part of the masks, and of the guarantee.
    masks : mapping of Parameter to PackedMask

    Returns
    -------
    Freezing
        Holds the hooks; its ``remove`` ends it.

    Raises
    ------
    MaskError
        If no parameter of the optimizer has a masked coordinate, or a mask does not fit; while training, a sparse
        gradient of a parameter with a mask.

    Examples
    --------
    >>> import torch
    >>> from ckptdiff.retrain import freeze_outside, load_masks
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, weight_decay=0.1)
    >>> with freeze_outside(optimizer, load_masks("run.h5", model)):
    ...     sum(p.square().sum() for p in model.parameters()).backward()
    ...     optimizer.step()
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    require_current(parameters, masks, parameters)
    counts = [_fitting(parameter, masks).count for parameter in parameters if parameter in masks]
    if not any(counts):
        raise MaskError(
            "no parameter of the optimizer has a masked coordinate: there is nothing to train",
            expected=f"some of the {len(masks)} masked parameters",
            found="none of them, or empty masks",
            hint="load the masks of the parameters that the optimizer has: after fully_shard, which makes new ones",
        )
    hooks: list[Any] = []
    outside: dict[Any, _Outside] = {}
    before: dict[Any, Tensor] = {}

    def adopt(parameters: list[Any]) -> None:
        new = [parameter for parameter in parameters if parameter not in outside]
        require_current(new, masks, parameters)
        for parameter in new:
            outside[parameter] = _Outside.of(parameter, masks)
            if parameter.requires_grad:
                hooks.append(_gradient_hook(parameter, outside[parameter]))

    @torch.no_grad()
    def remember(*_: Any) -> None:
        adopt([parameter for group in optimizer.param_groups for parameter in group["params"]])
        for parameter, frozen in outside.items():
            if frozen.coordinates is None:
                parameter.grad = None  # so that no state is made for it
            else:
                frozen.zero_gradient(parameter)
            before[parameter] = parameter.detach().clone()

    @torch.no_grad()
    def restore(*_: Any) -> None:
        for parameter, frozen in outside.items():
            start, where = before.pop(parameter), frozen.coordinates
            # One without a mask has moved too if the step took a closure, which brings gradients of zero back.
            parameter.copy_(start if where is None else torch.where(where, start, parameter))

    adopt(parameters)
    hooks += [optimizer.register_step_pre_hook(remember), optimizer.register_step_post_hook(restore)]
    return Freezing(hooks)


@dataclass(frozen=True, eq=False, slots=True)
class _Outside:
    """The frozen part of a parameter: some coordinates, or None for all."""

    coordinates: Tensor | None
    name: str | None

    @classmethod
    def of(cls, parameter: Any, masks: Mapping[Any, PackedMask]) -> _Outside:
        name = _name_of(parameter, masks)
        if parameter not in masks:
            return cls(None, name)
        dense = torch.from_numpy(_fitting(parameter, masks).inverted().dense())
        if not hasattr(parameter, "placements"):
            return cls(dense.to(parameter.device), name)
        from torch.distributed.tensor import distribute_tensor

        mesh = parameter.device_mesh
        return cls(distribute_tensor(dense.to(mesh.device_type), mesh, parameter.placements), name)

    def zero_gradient(self, parameter: Any) -> None:
        """In place, since the gradient may be a view of a bucket of DDP."""
        gradient = parameter.grad
        if gradient is not None and self.coordinates is None:
            gradient.zero_()
        elif gradient is not None:
            require_dense(gradient, self.name)
            gradient.masked_fill_(self.coordinates, 0.0)


def _fitting(parameter: Any, masks: Mapping[Any, PackedMask]) -> PackedMask:
    return require_fit(masks[parameter], tuple(parameter.shape), _name_of(parameter, masks))


def _name_of(parameter: Any, masks: Mapping[Any, PackedMask]) -> str | None:
    names: Mapping[Any, str] = getattr(masks, "names", {})
    return names.get(parameter)


def _gradient_hook(parameter: Any, outside: _Outside) -> Any:
    return parameter.register_post_accumulate_grad_hook(outside.zero_gradient)
