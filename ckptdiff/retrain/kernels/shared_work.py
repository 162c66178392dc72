"""Hand out the pieces of a step to the threads that make it: each calls a kernel once, whatever number of parameters.

Parameters are the rows of a table that holds addresses; whoever makes it keeps alive what they point to. Each row is
some units of work, and a thread takes the next one that nobody has.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.jit import Later, helper, intrinsic
from ckptdiff.measure.kernels.tiles import Array

__all__ = ["next_unit", "table_of"]

types, arrayobj = Later("numba.types"), Later("numba.np.arrayobj")


def table_of(*columns: str) -> np.dtype[Any]:
    """Dtype of a table with these columns, all int64, and `end`: the units of all rows up to the end of this one."""
    return np.dtype([(column, np.int64) for column in (*columns, "end")])


@intrinsic
def _take(typing: Any, counter: Any) -> Any:
    """What ``counter[0]`` is, before it becomes one more, whoever else takes one now."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = arrayobj.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", address, context.get_constant(types.int64, 1), "monotonic")

    return types.int64(counter), generate


@helper
def next_unit(rows: Array, row: int, counter: Array) -> tuple[int, int]:
    """Row of the next unit that no thread has taken, and which one of the row it is; ``rows.size`` if there is none.

    `row` is what this thread got before, 0 at first; `counter`, int64 and of shape (1,), is zero at first, and shared.
    """
    unit = _take(counter)
    while row < rows.size and unit >= rows[row].end:
        row += 1
    return row, unit - (rows[row - 1].end if row else 0)
