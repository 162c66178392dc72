"""Measure integer, boolean and opaque dtypes, of which only bit equality counts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ckptdiff.measure.partial import BitScan, Count, Partial
from ckptdiff.measure.source import Source, blocks_of_span


def scan_bits(scan: BitScan, source: Source, partial: Partial) -> NDArray[np.uint8] | None:
    """Measure a span of blocks; returns mask bits if ``scan.want_mask``."""
    masks = [np.zeros(0, np.uint8)]
    for base, tuned in blocks_of_span(source, (scan.bits, scan.bits)):
        changed = changed_elements(base, tuned, scan.bits)
        partial.numel += changed.size
        partial.counts[[Count.CHANGED, Count.MASKED]] += np.count_nonzero(changed)
        masks.append(np.packbits(changed, bitorder="little"))
    return np.concatenate(masks) if scan.want_mask else None


def changed_elements(base: NDArray[np.uint8], tuned: NDArray[np.uint8], bits: int) -> NDArray[np.bool_]:
    """Which of n elements differ in any bit; sides of shape (n * bits / 8,), packed from the low bit on if below 8."""
    different = base ^ tuned
    groups = (
        np.unpackbits(different, bitorder="little").reshape(-1, bits) if bits % 8 else different.reshape(-1, bits // 8)
    )
    return np.asarray(groups.max(axis=1, initial=0) > 0, bool)
