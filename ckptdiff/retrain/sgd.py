"""Step as SGD on the masked coordinates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.sgd import sgd

from ckptdiff.errors import OptionError
from ckptdiff.retrain.kernels.masked_steps import SGD
from ckptdiff.retrain.optimizer import MaskedOptimizer
from ckptdiff.retrain.packed import PackedMask


class MaskedSGD(MaskedOptimizer):
    """SGD, with or without momentum, that trains the masked coordinates and leaves all others alone.

    On masked coordinates the trajectory is that of ``torch.optim.SGD`` with masked gradients, up to rounding in
    float32; momentum that was there before cannot move a frozen coordinate, because there is none.

    Parameters
    ----------
    params, masks, fp32_master
        See :class:`~ckptdiff.retrain.optimizer.MaskedOptimizer`.
    lr, momentum, dampening, weight_decay : float
    nesterov : bool
        Needs momentum and no dampening.

    Raises
    ------
    OptionError
        A number out of range.
    MaskError
        Masks that do not fit.

    Examples
    --------
    >>> from ckptdiff.retrain import MaskedSGD, load_masks
    >>> masks = load_masks("run.h5", model)
    >>> optimizer = MaskedSGD(model.parameters(), masks, lr=1e-5)
    >>> sum(p.square().sum() for p in model.parameters()).backward()
    >>> optimizer.step()
    """

    options = ("lr", "momentum", "dampening", "weight_decay", "nesterov")
    rule = SGD
    columns = ("momentum_buffer", "")

    def __init__(
        self,
        params: Iterable[Any],
        masks: Mapping[Any, PackedMask],
        lr: float = 1e-3,
        *,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        fp32_master: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, masks, defaults, fp32_master)

    def require_range(self, group: Mapping[str, Any]) -> None:
        """As torch does."""
        lr, momentum, weight_decay = (group[key] for key in ("lr", "momentum", "weight_decay"))
        if not (lr >= 0 and momentum >= 0 and weight_decay >= 0):
            raise OptionError(
                "a number out of range",
                expected="lr, momentum and weight_decay of at least 0",
                found=f"lr {lr}, momentum {momentum}, weight_decay {weight_decay}",
            )
        if group["nesterov"] and (not momentum or group["dampening"]):
            raise OptionError(
                "Nesterov's momentum needs momentum, and no dampening",
                found=f"momentum {momentum}, dampening {group['dampening']}",
            )

    def slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The momentum buffer, if there is momentum."""
        return self.columns[:1] if group["momentum"] else ()

    def constants(self, group: dict[str, Any], step: int, fresh: bool) -> list[float]:
        """As :func:`~ckptdiff.retrain.kernels.masked_steps.masked_steps` takes them."""
        share = 1.0 if fresh else 1 - group["dampening"]  # the first gradient goes into a buffer whole
        used = group["weight_decay"], group["momentum"], share, group["nesterov"]
        return [float(group["lr"]), *map(float, used), 0.0]

    def functional(
        self,
        group: dict[str, Any],
        values: list[Tensor],
        gradients: list[Tensor],
        states: Sequence[Any],
        fresh: Sequence[bool],
    ) -> None:
        """``torch.optim.sgd.sgd``."""
        buffers: list[Tensor | None] = [
            state["momentum_buffer"] if group["momentum"] and not new else None
            for state, new in zip(states, fresh, strict=True)
        ]
        sgd(
            values,
            gradients,
            buffers,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=float(group["lr"]),
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=False,
        )
        for state, buffer in zip(states, buffers, strict=True):
            state["step"] += 1
            if buffer is not None:
                state["momentum_buffer"] = buffer
