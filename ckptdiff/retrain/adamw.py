"""Step as AdamW on the masked coordinates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.adamw import adamw

from ckptdiff.errors import OptionError
from ckptdiff.retrain.kernels.masked_steps import ADAMW
from ckptdiff.retrain.optimizer import MaskedOptimizer
from ckptdiff.retrain.packed import PackedMask


class MaskedAdamW(MaskedOptimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) that trains the masked coordinates and leaves all others alone.

    On masked coordinates the trajectory is that of ``torch.optim.AdamW`` with masked gradients, up to rounding in
    float32; the others keep every bit: neither weight decay nor rounding touches them. State takes 10 bytes per masked
    coordinate of a float32 parameter in main memory (two moments and a position), 14 of a bfloat16 one with its float32
    master; two more elsewhere. What the compiled kernels do not serve (float16, float64, other devices, parameters
    that are not contiguous) goes through torch's indexing, which is slower: 16 bytes of a float16 parameter with its
    master, 20 of a float64 one.

    Parameters
    ----------
    params, masks, fp32_master
        See :class:`~ckptdiff.retrain.optimizer.MaskedOptimizer`.
    lr : float
    betas : (float, float)
    eps : float
    weight_decay : float
        Decoupled, and applied to masked coordinates only.

    Raises
    ------
    OptionError
        A number out of range.
    MaskError
        Masks that do not fit.

    Examples
    --------
    >>> from ckptdiff.retrain import MaskedAdamW, load_masks
    >>> masks = load_masks("run.h5", model)
    >>> optimizer = MaskedAdamW(model.parameters(), masks, lr=1e-5)
    >>> sum(p.square().sum() for p in model.parameters()).backward()
    >>> optimizer.step()
    """

    options = ("lr", "betas", "eps", "weight_decay")
    rule = ADAMW
    columns = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        masks: Mapping[Any, PackedMask],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        fp32_master: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, masks, defaults, fp32_master)

    def require_range(self, group: Mapping[str, Any]) -> None:
        """As torch does."""
        lr, betas, eps, weight_decay = (group[key] for key in ("lr", "betas", "eps", "weight_decay"))
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise OptionError(
                "a number out of range",
                expected="lr, eps and weight_decay of at least 0, and betas in [0, 1)",
                found=f"lr {lr}, eps {eps}, weight_decay {weight_decay}, betas {betas}",
            )

    def slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Both moments."""
        return self.columns

    def constants(self, group: dict[str, Any], step: int, fresh: bool) -> list[float]:
        """As :func:`~ckptdiff.retrain.kernels.masked_steps.masked_steps` takes them."""
        lr, (beta1, beta2) = float(group["lr"]), map(float, group["betas"])
        correction = math.sqrt(1 - beta2**step)
        return [
            1 - lr * group["weight_decay"],
            1 - beta1,
            beta2,
            1 - beta2,
            group["eps"] * correction,
            lr * correction / (1 - beta1**step),
        ]

    def functional(
        self,
        group: dict[str, Any],
        values: list[Tensor],
        gradients: list[Tensor],
        states: Sequence[Any],
        fresh: Sequence[bool],
    ) -> None:
        """``torch.optim.adamw.adamw``, which also counts the steps."""
        beta1, beta2 = map(float, group["betas"])
        adamw(
            values,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
