"""Which file system holds a file, and how files on it are best read."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ckptdiff.options import Io

__all__ = ["choose_io"]

_NETWORK = ("nfs", "cifs", "smb", "fuse", "9p", "ceph", "lustre", "gpfs", "beegfs", "afs", "glusterfs", "orangefs")
_MOUNTS = Path("/proc/self/mountinfo")


def choose_io(io: Io, paths: Sequence[str]) -> str:
    """Decide on "mmap" or "pread": what was asked for, else mmap unless a file lies on a network file system."""
    if io != "auto":
        return io
    kinds = {_file_system(path) for path in paths}
    return "pread" if any(kind.startswith(_NETWORK) for kind in kinds) else "mmap"


def _file_system(path: str) -> str:
    """Type of the file system that holds a path, "" where the system does not tell."""
    try:
        lines = os.fsdecode(_MOUNTS.read_bytes()).split("\n")
    except OSError:
        return ""
    real = os.path.realpath(path)
    best, kind = "", ""
    for line in lines:
        head, _, tail = line.partition(" - ")
        if not tail:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), head.split(" ")[4])
        if (real == point or real.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, tail.split(" ")[0]
    return kind
