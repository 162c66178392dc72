"""Read the rows of a box of a stored matrix: a read each, without going back to Python between them."""

from __future__ import annotations

from ckptdiff.codes.fetch import ATTEMPTS, Array, read_at
from ckptdiff.jit import kernel

__all__ = ["read_box"]


@kernel
def read_box(descriptor: int, offset: int, stride: int, out: Array) -> int:
    """Read parts of equal length.

    Parameters
    ----------
    descriptor : int
        Of an open file.
    offset, stride : int
        Where the first part begins in it, and how far behind it the next one.
    out : uint8 array, shape (parts, bytes)
        Receives them.

    Returns
    -------
    int
        How many came.
    """
    flat, size = out.reshape(-1), out.shape[1]
    for row in range(len(out)):
        done, attempts = 0, 0
        while done < size and attempts < ATTEMPTS:
            count = read_at(descriptor, flat, row * size + done, size - done, offset + row * stride + done)
            if count > 0:
                done += count
            else:  # a signal interrupts once; whatever else is wrong stays wrong
                attempts += 1
        if done < size:
            return row
    return len(out)
