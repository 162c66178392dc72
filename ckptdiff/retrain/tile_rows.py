"""Gather what a compiled kernel is told of the parameters of a step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ckptdiff.retrain.kernels.masked_steps import MASKED
from ckptdiff.retrain.step_threads import run_kernel
from ckptdiff.retrain.support import COMPILED, Masked, TileSupport

_NO_STEP = 0, 0, 0, 0, 0, 0


class TileRows:
    """Rows of `MASKED`, and what must live as long as they are used."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, ...]] = []
        self._gradients: list[Tensor] = []
        self.units = 0
        """Units of work of all rows."""

    def add(self, parameter: Tensor, masked: Masked, *step: int) -> None:
        """Add a parameter with its gradient, and the columns of a step, from `count` on."""
        support, gradient = masked.support, parameter.grad
        assert isinstance(support, TileSupport)
        if gradient.dtype not in COMPILED:
            gradient = gradient.to(parameter.dtype)
        gradient = gradient.contiguous()
        self._gradients.append(gradient)
        self.units += support.units
        self._rows.append(
            (
                parameter.data_ptr(),
                gradient.data_ptr(),
                parameter.numel(),
                parameter.dtype is torch.bfloat16,
                gradient.dtype is torch.bfloat16,
                support.positions.data_ptr(),
                support.starts.data_ptr(),
                masked.count,
                *(step or _NO_STEP),
                self.units,
            )
        )

    def run(self, kernel: Callable[..., None], argument: object) -> None:
        """Call a kernel for all of them."""
        run_kernel(kernel, np.array(self._rows, MASKED), argument)
