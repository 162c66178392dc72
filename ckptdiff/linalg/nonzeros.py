"""Keep the entries of an update that are not zero, and multiply with them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.codes.lanes import aligned
from ckptdiff.linalg.kernels.nonzeros import STEP, add_squared_product, gather_nonzeros
from ckptdiff.linalg.threads import count_work, end_if_stopped

Floats = NDArray[Any]

_GATHERED, _ADDED = 60.0, 8.0
"""The work of looking at an entry, and of adding one to a column of a product, twice."""


class Nonzeros:
    """A matrix d of mostly zeros, which comes in panels, and ``d.T @ d`` by its other entries."""

    def __init__(self, *panels: Floats) -> None:
        self._panels: list[tuple[NDArray[np.int32], Floats, NDArray[np.int64]]] = []
        for panel in panels:
            self.add(panel)

    def add(self, panel: Floats) -> None:
        """Take a C-contiguous panel."""
        size = int(np.count_nonzero(panel))
        lists = np.empty(size, np.int32), np.empty(size, panel.dtype), np.empty(len(panel), np.int64)
        gather_nonzeros(panel, *lists)
        self._panels.append(lists)
        count_work(_GATHERED * panel.size)

    def squared_product(self, block: Floats) -> Floats:
        """``d.T @ (d @ block)``."""
        width, count = block.shape
        room = -(-count // STEP) * STEP
        right, out, row = (aligned((rows, room), block.dtype) for rows in (width, width, 1))
        right[:, :count], right[:, count:], out[:] = block, 0, 0
        for columns, values, ends in self._panels:
            end_if_stopped()
            add_squared_product(columns, values, ends, right, row, out)
            count_work(_ADDED * room * len(values))
        return out[:, :count]
