"""Which backend measures, and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ckptdiff.backends.formats import Format
from ckptdiff.backends.partial import BLOCK, Partial, Refined, Rule, Scan, Targets
from ckptdiff.stream.worker import Backend

__all__ = ["Device", "open_device"]


@dataclass(frozen=True, slots=True)
class Device:
    """A backend that was chosen and found to work.

    Attributes
    ----------
    name : str
    worker : callable
        Makes the backend of one thread.
    """

    name: str
    worker: Callable[[], Backend]

    def scratch(self, base: Format, tuned: Format, compare: Format, numel: int) -> int:
        """Bytes of work space that a thread needs for a pair, beside the blocks themselves."""
        if self.name == "reference":
            return 240 * min(numel, BLOCK)
        return 0 if base == tuned == compare else 14 << 20

    def warm_up(self, formats: Iterable[tuple[Format, Format, Format]]) -> None:
        """Load or compile the kernels of each (base, tuned, compare) before anything is timed or measured."""
        worker = self.worker()
        for base, tuned, compare in formats:
            one = np.frombuffer(bytes(base.bits // 8), np.uint8), np.frombuffer(bytes(tuned.bits // 8), np.uint8)
            worker.scan(Scan(base, tuned, compare, (0.0,), rule=Rule.BITWISE, want_mask=True), [one], Partial())
            if compare.bits > 16:
                targets = Targets(16)
                worker.refine(Scan(base, tuned, compare), targets, [one], Refined.empty(targets))


def open_device(name: str) -> Device:
    """Choose a backend: "auto" and "cpu" are the Numba kernels, "reference" is NumPy."""
    if name == "reference":
        from ckptdiff.backends.reference import ReferenceWorker

        return Device("reference", ReferenceWorker)
    from ckptdiff.backends.cpu import CpuWorker

    return Device("cpu", CpuWorker)
