"""Tell how much memory this process holds, and how much it may take where the user set no bound."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

DEFAULT_MEMORY = 400 << 20
"""Bytes that a comparison may take, or more where its threads need more."""
SPECTRA_MEMORY = {"randomized": 1_250_000_000, "exact": 4_000_000_000}
"""Bytes that the spectra of a mode may take with two threads, half of it more for each further one; exact mode needs
float64 copies of a Gram matrix."""

_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


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


def default_bound(usual: int, needed: int, most: int) -> int:
    """The bound on the peak resident size where the user gave none: what all threads need, in bytes.

    It is `usual` at least, even on a machine that has less, and does not exceed `most` for their sake.
    """
    return max(usual, min(needed, most))


def room_to_grow(held: int = 0) -> int:
    """Half of the machine's memory beyond what a process holds already, in bytes."""
    return (machine_memory() - held) // 2


def machine_memory(groups: Path = _GROUPS, own: Path = _OWN_GROUPS) -> int:
    """Bytes that this process could have at most: all of the machine, or what its control group is limited to.

    The system shows control groups in `groups`, and the file `own` says in which of them this process is.
    """
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([whole, *_group_limits(groups, own)])


def _group_limits(shown: Path, own: Path) -> Iterator[int]:
    """Limits of the control groups that this process is in, under version 2 or 1."""
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers in ("", "memory"):
            root, name = (shown, "memory.max") if not controllers else (shown / "memory", "memory.limit_in_bytes")
            # In a container the path may be that of the host, which is not there: the root is the container's own then.
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):
                if not folder.is_relative_to(root):
                    break
                try:
                    yield int((folder / name).read_text())
                except (OSError, ValueError):  # not there, or "max"
                    continue
