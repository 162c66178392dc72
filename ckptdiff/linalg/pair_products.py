"""Make Gram matrices of bfloat16 values with products of bfloat16, on processors that have them."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from ckptdiff.codes.lanes import aligned
from ckptdiff.kernel_library import kernels_in_use, processor_flags
from ckptdiff.linalg.kernels.pair_products import BLOCK, COLUMNS, ROWS, add_packed_gram, pack_pairs
from ckptdiff.linalg.threads import in_parts, thread_count


@cache
def multiplies_pairs() -> bool:
    """Whether this processor, and the kernels in use, multiply bfloat16 values in pairs."""
    return "avx512_bf16" in processor_flags() and kernels_in_use() in ("compiled on the spot", "x86_64-v4")


def add_pair_gram(total: NDArray[np.float32], panel: NDArray[np.float32], work: float = 0.0) -> bool:
    """Add ``panel.T @ panel`` to the lower triangle of `total` if all values of the panel are bfloat16 values.

    Else nothing is added, and False is returned. Both are C-contiguous. It counts as so much work. The smallest
    numbers, below 2^-126, and products below that may count as zeros.
    """
    rows, columns = panel.shape
    blocks = -(-columns // COLUMNS) * (COLUMNS // BLOCK)
    packed = aligned((blocks, -(-rows // 2), BLOCK), np.uint32)
    codes, fits = panel.view(np.uint32), np.ones(blocks, bool)
    parts = min(blocks // 2, thread_count())

    def ends(part: int, power: float) -> list[int]:
        return [2 * int(blocks / 2 * (at / parts) ** power) for at in (part, part + 1)]

    def pack(part: int) -> None:
        fits[part] = pack_pairs(codes, packed, *ends(part, 1.0))

    def add(part: int) -> None:
        # Rows of a triangle: later ones are longer.
        first, stop = ends(part, 0.5)
        add_packed_gram(total, packed, first, stop, aligned((ROWS, COLUMNS), np.float32))

    in_parts(pack, parts)
    if not fits.all():
        return False
    in_parts(add, parts, work)
    return True
