"""Multiply matrices, cut into parts that the threads of a matrix share.

The parts depend on the sizes alone, so that no digit depends on the number of threads.
"""

from __future__ import annotations

import numpy as np

from ckptdiff.linalg.blas import add_gram_block, add_product_block
from ckptdiff.linalg.stages import Array, array_module
from ckptdiff.linalg.threads import in_parts

_PART = 256
"""Rows of a part, at least: what a part reads again should cost little beside its product."""
_MOST_PARTS = 16
_GRAM_PART = 512
_READ = 16
"""Columns of a product that take as long as to read its left side: narrow products wait for memory."""


def product_work(rows: float, inner: float, columns: float, itemsize: int) -> float:
    """The work of a product of (rows, inner) and (inner, columns)."""
    return rows * inner * (columns + _READ) * itemsize / 4


def gram_work(rows: float, columns: float, itemsize: int) -> float:
    """The work of a Gram matrix of (rows, columns)."""
    return rows * columns * columns / 2 * itemsize / 4


def cuts(size: int, least: int = _PART, most: int = _MOST_PARTS) -> list[int]:
    """Where to cut `size` rows: a power of two of nearly equal parts of `least` rows or more, ends included."""
    parts = min(1 << max((size // least).bit_length() - 1, 0), most)
    # Whole vectors of the processor.
    step = -(-size // (16 * parts)) * 16
    return [min(step * part, size) for part in range(parts + 1)]


def product(left: Array, right: Array) -> Array:
    """``left @ right``, float arrays of one dtype, shapes (m, k) and (k, n), with contiguous rows or columns."""
    if array_module(left) is not np:
        return left @ right
    out = np.empty((left.shape[0], right.shape[1]), left.dtype)
    _products(out, left, right, keep=False)
    return out


def add_product(out: Array, left: Array, right: Array) -> None:
    """Add ``left @ right``, as in :func:`product`, to `out`, a C-contiguous array of shape (m, n)."""
    if array_module(left) is not np:
        out += left @ right
    else:
        _products(out, left, right, keep=True)


def _products(out: Array, left: Array, right: Array, *, keep: bool) -> None:
    at = cuts(len(out))
    in_parts(
        lambda part: add_product_block(out[at[part] : at[part + 1]], left[at[part] : at[part + 1]], right, keep=keep),
        len(at) - 1,
        product_work(len(left), len(right), len(right.T), out.itemsize),
    )


def add_gram(total: Array, panel: Array) -> None:
    """Add ``panel.T @ panel`` to the lower triangle of `total`: C-contiguous, shapes (rows, n) and (n, n)."""
    if array_module(panel) is not np:
        total += panel.T @ panel
        return
    at = cuts(panel.shape[1], _GRAM_PART)

    def add(part: int) -> None:
        first, stop = at[part], at[part + 1]
        add_gram_block(total[first:stop, first:stop], panel[:, first:stop])
        if stop < at[-1]:
            add_product_block(total[stop:, first:stop], panel[:, stop:].T, panel[:, first:stop])

    in_parts(add, len(at) - 1, gram_work(len(panel), panel.shape[1], panel.itemsize))
