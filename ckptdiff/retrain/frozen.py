"""Keep what lies outside the masks of parameters, and put it back after a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ckptdiff.retrain.kernels.outside import OUTSIDE, UNIT
from ckptdiff.retrain.packed import PackedMask, require_fit
from ckptdiff.retrain.refusals import require_dense
from ckptdiff.retrain.step_threads import run_kernel

_PLAIN = (Tensor, torch.nn.Parameter)
_CODES = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32), 8: (torch.int64, np.uint64)}


class OutsideRows:
    """What kernels are told of some tensors, by the width of their codes."""

    def __init__(self) -> None:
        self._rows: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        self._units: dict[int, int] = defaultdict(int)

    def add(self, size: int, numel: int, *addresses: int) -> None:
        """Add a tensor; addresses as in `OUTSIDE`."""
        self._units[size] = units = self._units[size] - (-numel // UNIT)
        self._rows[size].append((*addresses, numel, units))

    def run(self, kernel: Callable[..., None]) -> None:
        """Call a kernel for all of them."""
        for size, rows in self._rows.items():
            run_kernel(kernel, np.array(rows, OUTSIDE), np.empty(0, _CODES[size][1]))


class Frozen:
    """The part of a parameter outside its mask: all of it without one, or with an empty one.

    Contiguous tensors in main memory go through the compiled kernels, with a bit of mask for each coordinate; torch
    serves all others, such as DTensors, with a boolean.
    """

    def __init__(self, parameter: Any, masks: Mapping[Any, PackedMask]) -> None:
        self.parameter = parameter
        self.name: str | None = getattr(masks, "names", {}).get(parameter)
        self.given = masks.get(parameter)
        self.shape = tuple(parameter.shape)
        fitting = None if self.given is None else require_fit(self.given, self.shape, self.name)
        self.mask = fitting if fitting is not None and fitting.count else None
        self._words: Tensor | None = None
        self._kept = torch.empty(0, dtype=torch.uint8)
        self._sums = torch.empty(0)
        self._outside: Tensor | None = None
        self._before: Tensor | None = None

    def zero_gradient(self, rows: OutsideRows) -> None:
        """Set the gradient to zero in place: it may be a view of a bucket of DDP."""
        gradient = self.parameter.grad
        if gradient is not None and self.mask is None:
            gradient.zero_()
        elif gradient is not None and not self._is_dense(gradient):
            rows.add(gradient.element_size(), gradient.numel(), 0, gradient.data_ptr(), 0, 0, self._inside().data_ptr())

    def prepare(self, rows: OutsideRows) -> None:
        """Zero the gradient, and keep the values as they are before a step."""
        parameter, gradient = self.parameter, self.parameter.grad
        if self.mask is not None and parameter.shape != self.shape:
            require_fit(self.mask, tuple(parameter.shape), self.name)
        if self.mask is None or not _is_plain(parameter):
            self.zero_gradient(rows)
            self._before = parameter.detach().clone()
            return
        size, numel = parameter.element_size(), parameter.numel()
        if self._kept.element_size() != size:
            # Sums of zeros are zero.
            self._kept = torch.zeros(numel, dtype=_CODES[size][0])
            self._sums = torch.zeros(-(-numel // UNIT), dtype=torch.int64)
        slopes = 0
        if gradient is not None and not self._is_dense(gradient):
            if gradient.element_size() == size:
                slopes = gradient.data_ptr()
            else:
                self.zero_gradient(rows)
        kept, sums = self._kept.data_ptr(), self._sums.data_ptr()
        rows.add(size, numel, parameter.data_ptr(), slopes, kept, sums, self._inside().data_ptr())

    def restore(self, rows: OutsideRows) -> None:
        """Put back what was kept."""
        parameter, before = self.parameter, self._before
        if before is None and not self._kept.numel():  # it was put back already
            return
        if before is None:
            size = self._kept.element_size()
            if _is_plain(parameter) and parameter.element_size() == size and parameter.shape == self.shape:
                kept = self._kept.data_ptr()
                rows.add(size, parameter.numel(), parameter.data_ptr(), 0, kept, 0, self._inside().data_ptr())
                return
            # The step put another tensor in its place.
            before = self._kept.view(parameter.dtype).view(parameter.shape).to(parameter.device)
        if self.mask is not None:
            before = torch.where(self._coordinates(parameter), before, parameter)
        parameter.copy_(before)
        self._before = None

    def _is_dense(self, gradient: Any) -> bool:
        """Whether a gradient was set to zero with booleans, since no kernel serves it."""
        require_dense(gradient, self.name)
        if _is_plain(gradient) and gradient.shape == self.shape:
            return False
        gradient.masked_fill_(self._coordinates(gradient), 0.0)
        return True

    def _inside(self) -> Tensor:
        """The mask, in words of 64 bits."""
        if self._words is None:
            assert self.mask is not None
            self._words = torch.zeros(-(-self.mask.numel // 64), dtype=torch.int64)
            self._words.numpy().view(np.uint8)[: self.mask.bits.size] = self.mask.bits
        return self._words

    def _coordinates(self, tensor: Any) -> Tensor:
        """Booleans of what lies outside, placed as the tensor is."""
        assert self.mask is not None
        if self._outside is None or self._outside.device != tensor.device:
            outside = torch.from_numpy(self.mask.inverted().dense())
            if hasattr(tensor, "placements"):
                from torch.distributed.tensor import distribute_tensor

                mesh = tensor.device_mesh
                self._outside = distribute_tensor(outside.to(mesh.device_type), mesh, tensor.placements)
            else:
                self._outside = outside.to(tensor.device)
        return self._outside


def _is_plain(tensor: Any) -> bool:
    """Whether the compiled kernels serve a tensor."""
    return (
        type(tensor) in _PLAIN
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and tensor.element_size() in _CODES
    )
