"""How much memory this process holds, as the system counts it."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

__all__ = ["peak_resident", "resident"]


def resident() -> int:
    """Resident size now, in bytes; the peak where the system tells no more."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_resident()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_resident() -> int:
    """Largest resident size so far, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    # ru_maxrss may stem from the process that started this one, so it comes second.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
