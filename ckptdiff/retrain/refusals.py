"""Refuse what masked training cannot do, by the parameter's name."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import Tensor

from ckptdiff.errors import MaskError, OptionError
from ckptdiff.retrain.support import Support, TileSupport, is_compiled

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


def require_unmoved(parameter: Tensor, support: Support, shape: tuple[int, ...], name: str | None) -> None:
    """Raise a MaskError for a parameter that is not as it was when its optimizer was made.

    The kernels go by the mask, and would write beyond the end of what has become smaller.
    """
    compiled = isinstance(support, TileSupport)
    if tuple(parameter.shape) != shape or (compiled and not is_compiled(parameter)):
        strides = parameter.stride()
        raise MaskError(
            "a parameter was moved, cast or sharded after its optimizer was made",
            tensor=name,
            expected=f"as it was then: shape {shape}" + (", contiguous, in main memory" if compiled else ""),
            found=f"shape {tuple(parameter.shape)}, {parameter.dtype}, on {parameter.device}, strides {strides}",
            hint="make the optimizer when the model is where it trains; freeze_outside works with sharded parameters",
        )
