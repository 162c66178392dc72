"""Integer, boolean and opaque dtypes, of which only bit equality is measured."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["changed_elements"]


def changed_elements(base: NDArray[np.uint8], tuned: NDArray[np.uint8], bits: int) -> NDArray[np.bool_]:
    """Which elements differ in any bit.

    Parameters
    ----------
    base, tuned : uint8 array, shape (n * bits / 8,)
        Raw bytes of n elements; elements of less than 8 bits are packed from the low bit up.
    bits : int
        Bits of an element.
    """
    if bits % 8 == 0:
        width = bits // 8
        word = np.dtype(f"u{width}") if width in (1, 2, 4, 8) else np.dtype((np.void, width))
        return np.asarray(base.view(word) != tuned.view(word))
    return np.unpackbits(base ^ tuned, bitorder="little").reshape(-1, bits).any(axis=1)
