"""Refuse what masked training cannot do, by the parameter's name."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import Tensor

from ckptdiff.errors import MaskError, OptionError
from ckptdiff.retrain.support import Masked, TileSupport, is_compiled, state_dtype

_OTHERS = ("maximize", "amsgrad", "nesterov", "differentiable")
"""Options of torch's own optimizers that would change a step, and that a group may bring along."""


def require_dense(gradient: Tensor, name: str | None) -> None:
    """Raise a MaskError for a sparse gradient."""
    if gradient.is_sparse:
        raise MaskError(
            "masks need dense gradients",
            tensor=name,
            expected="a dense gradient",
            found="a sparse one",
            hint="make the embedding with sparse=False",
        )


def require_whole(parameter: Tensor, name: str | None) -> None:
    """Raise a MaskError for a parameter that is sharded over devices."""
    if hasattr(parameter, "placements"):
        raise MaskError(
            "a masked optimizer takes no sharded parameters",
            tensor=name,
            expected=f"a whole parameter of shape {tuple(parameter.shape)}",
            found=f"one that is sharded over devices: {parameter.placements}",
            hint="give one of torch's to freeze_outside: freeze_outside(torch.optim.AdamW(model.parameters()), masks)",
        )


def require_current(new: Iterable[Any], masks: Mapping[Any, object], held: Iterable[Any]) -> None:
    """Raise a MaskError for sharded parameters of which the masks seem to have the whole ones that they were made of.

    Of such nothing would be trained. The optimizer has what is `held`, `new` parameters among it, and so no longer
    those that the masks are of.
    """
    without = [parameter for parameter in new if hasattr(parameter, "placements") and parameter not in masks]
    if not without:
        return
    gone = set(masks).difference(held)
    old = [p for p in masks if p in gone and p.requires_grad and not hasattr(p, "placements")]
    for parameter in without:
        for whole in old:
            if whole.shape == parameter.shape:
                raise MaskError(
                    "masks were loaded before the model was sharded",
                    tensor=getattr(masks, "names", {}).get(whole),
                    expected=f"a mask of the sharded parameter of shape {tuple(parameter.shape)}",
                    found="one of a whole parameter, which the optimizer does not have",
                    hint="load the masks after fully_shard, which makes new parameters",
                )


def require_known(group: Mapping[str, Any], options: Container[str]) -> None:
    """Raise an OptionError for a group with an option that would change a step and is none of `options`."""
    for option in _OTHERS:
        if group.get(option) and option not in options:
            raise OptionError(
                "an option that this optimizer does not have",
                expected=f"no {option}",
                found=f"{option}={group[option]}",
                hint="freeze_outside serves any torch optimizer",
            )


def not_known(parameter: Tensor) -> MaskError:
    """The error for a parameter that an optimizer was not made with, nor given later."""
    return MaskError(
        "a parameter took the place of another after the optimizer was made",
        expected="the parameters that the masks were given for",
        found=f"another one of shape {tuple(parameter.shape)}, for which there is no mask",
        hint="make the optimizer when the model is where, and wrapped as, it trains",
    )


def require_unmoved(parameter: Tensor, masked: Masked) -> None:
    """Raise a MaskError for a parameter, or a gradient, that is not as the parameter was when its optimizer was made.

    The kernels go by the mask, and would write beyond the end of what has become smaller.
    """
    support, gradient = masked.support, parameter.grad
    if isinstance(support, TileSupport):
        there, place = is_compiled(parameter), "contiguous, in main memory"
    else:
        there, place = support.index.device == parameter.device, f"on {support.index.device}"
    if not there or parameter.shape != masked.shape:
        raise MaskError(
            "a parameter was moved, cast or sharded after its optimizer was made",
            tensor=masked.name,
            expected=f"as it was then, with its mask: shape {masked.shape}, {place}",
            found=f"shape {tuple(parameter.shape)}, {parameter.dtype}, on {parameter.device}, "
            f"strides {parameter.stride()}",
            hint="make the optimizer when the model is where it trains; freeze_outside works with sharded parameters",
        )
    require_dense(gradient, masked.name)
    if gradient.shape != parameter.shape or gradient.device != parameter.device:
        raise MaskError(
            "a gradient is not that of its parameter",
            tensor=masked.name,
            expected=f"shape {masked.shape}, on {parameter.device}",
            found=f"shape {tuple(gradient.shape)}, on {gradient.device}",
            hint="call zero_grad() after parameters were moved",
        )


def require_state(value: object, slot: str, parameter: Tensor, masked: Masked, loading: bool = False) -> None:
    """Raise a MaskError for state that a kernel cannot take: it would read beyond the end of what is smaller.

    State that is loaded may be of another dtype, or elsewhere: it is copied.
    """
    dtype = state_dtype(parameter)
    if not isinstance(value, Tensor):
        found = type(value).__name__
    elif value.numel() == masked.count and (
        loading or (value.dtype is dtype and value.is_contiguous() and value.device == parameter.device)
    ):
        return
    else:
        found = f"{value.dtype}, shape {tuple(value.shape)}, on {value.device}"
    raise MaskError(
        f"the optimizer's state {slot} does not fit the mask of its parameter",
        tensor=masked.name,
        expected=f"{dtype}, shape {(masked.count,)}, on {parameter.device}",
        found=found,
        hint="load_state_dict takes a state to where its parameter is",
    )
