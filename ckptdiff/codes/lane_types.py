"""Types of what lanes keep in registers: Numba's own, so this is imported only where something is compiled."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel import models
from numba.core.datamodel.registry import register_default

from ckptdiff.codes.lanes import LANES

__all__ = ["Codes", "Reals"]


class Codes(types.Type):  # type: ignore[misc]
    """Sixty-four codes of some bits each."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        super().__init__(name=f"Codes({bits})")


@register_default(Codes)
class _CodesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Codes) -> None:
        super().__init__(manager, kind, ir.VectorType(ir.IntType(kind.bits), LANES))


class Reals(types.Type):  # type: ignore[misc]
    """Sixty-four values of float64, in the order of :func:`~ckptdiff.codes.lanes.values_of_codes`.

    Products of those that float32 holds, ``single``, are exact.
    """

    def __init__(self, single: bool) -> None:
        self.single = single
        super().__init__(name=f"Reals({single})")


@register_default(Reals)
class _RealsModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Reals) -> None:
        super().__init__(manager, kind, ir.VectorType(ir.DoubleType(), LANES))
