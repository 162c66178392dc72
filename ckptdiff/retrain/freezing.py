"""Keep everything outside the masks as it is, under any torch optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch

from ckptdiff.errors import MaskError
from ckptdiff.retrain.frozen import Frozen, OutsideRows
from ckptdiff.retrain.kernels.outside import prepare, restore
from ckptdiff.retrain.packed import PackedMask, nothing_to_train
from ckptdiff.retrain.refusals import require_current


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

    Whatever looks at gradients afterwards, clipping included, sees masked ones. The masks take a bit per coordinate of
    a contiguous parameter in main memory, and a byte elsewhere. Masks that were loaded before ``fully_shard`` do
    nothing: they are of parameters that the model no longer has.

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
    return Freezing([_gradient_hook(Frozen(p, masks)) for p in masks if p.requires_grad])


def freeze_outside(optimizer: torch.optim.Optimizer, masks: Mapping[Any, PackedMask]) -> Freezing:
    """Let any torch optimizer train the masked coordinates only, and keep every bit of the others.

    Gradients are set to zero outside the masks when they are accumulated and again before each step, and after the step
    what lies outside is put back, because weight decay and momentum move it too (S1 does the same). Parameters of the
    optimizer without a mask are frozen whole. What lies outside is held twice, in a copy of each parameter with a mask,
    and the state of the optimizer stays dense: :class:`~ckptdiff.retrain.MaskedAdamW` needs neither. Parameters that
    the optimizer is given later are frozen too, by their masks or whole. Like all hooks, these are none of what is
    pickled or copied with an optimizer.

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
        gradient of a parameter with a mask, or another mask in the place of one.

    Examples
    --------
    >>> import torch
    >>> from ckptdiff.retrain import freeze_outside, load_masks
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, weight_decay=0.1)
    >>> with freeze_outside(optimizer, load_masks("run.h5", model)):
    ...     sum(p.square().sum() for p in model.parameters()).backward()
    ...     optimizer.step()
    """
    return _StepFreezing(optimizer, masks)


class _StepFreezing(Freezing):
    """The hooks of :func:`freeze_outside`, and what they know."""

    def __init__(self, optimizer: torch.optim.Optimizer, masks: Mapping[Any, PackedMask]) -> None:
        super().__init__([])
        self._optimizer = optimizer
        self._masks = masks
        self._frozen: dict[Any, Frozen] = {}
        self._prepared: list[Frozen] = []
        self._adopt()
        self._hooks += [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    def remove(self) -> None:
        """Take the hooks away, and put back what a step moved that did not come to its end."""
        self._after()
        super().remove()

    def _adopt(self) -> None:
        """Freeze what the optimizer was given since."""
        parameters = [*chain.from_iterable(group["params"] for group in self._optimizer.param_groups)]
        require_current([p for p in parameters if p not in self._frozen], self._masks, parameters)
        new = {p: Frozen(p, self._masks) for p in parameters if p not in self._frozen}
        known = self._frozen | new
        if not any(known[parameter].mask for parameter in parameters):
            hint = "load the masks of the parameters that the optimizer has: after fully_shard, which makes new ones"
            raise nothing_to_train(self._masks, hint)
        for parameter, frozen in self._frozen.items():
            if frozen.given is not self._masks.get(parameter):
                raise MaskError(
                    "the mask of a parameter is another one than when its training began",
                    tensor=frozen.name,
                    expected="the mask that freeze_outside was given",
                    found="another one in its place",
                    hint="remove() what freeze_outside returned, and call it with the new masks",
                )
        self._hooks += [_gradient_hook(frozen) for frozen in new.values() if frozen.parameter.requires_grad]
        self._frozen = known

    @torch.no_grad()
    def _before(self, _: object, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._after()  # of a step that an exception ended
        self._adopt()
        # A closure brings gradients back, if of zeros, and what has no mask would move by them.
        closure = any(value is not None for value in (*arguments, *options.values()))
        rows, prepared = OutsideRows(), []
        for frozen in self._frozen.values():
            if frozen.mask is None:
                frozen.parameter.grad = None  # so that no state is made for it
            if closure or frozen.mask is not None:
                frozen.prepare(rows)
                prepared.append(frozen)
        rows.run(prepare)
        self._prepared = prepared

    @torch.no_grad()
    def _after(self, *_: object) -> None:
        rows = OutsideRows()
        for frozen in self._prepared:
            frozen.restore(rows)
        rows.run(restore)
        self._prepared = []


def _gradient_hook(frozen: Frozen) -> Any:
    def zero(_: object) -> None:
        rows = OutsideRows()
        frozen.zero_gradient(rows)
        rows.run(prepare)

    return frozen.parameter.register_post_accumulate_grad_hook(zero)
