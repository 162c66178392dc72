"""Instruction sets that kernels can be compiled for, those of them that this processor has, and how to ask for one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# What the levels of x86-64 are told apart by, as the kernel of the system names it; v4 here has what the
# compaction of changed codes uses besides.
NEEDED = {
    "v3": {"avx2", "bmi2", "fma"},
    "v4": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vbmi2"},
}


def levels_here(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Levels that the processor has, the lower one first; one without a name, "native", where none is known."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
    return [name for name, needed in NEEDED.items() if needed <= flags] or ["native"]


def environment(level: str) -> dict[str, str]:
    """Variables under which a command and all it starts use kernels of a level."""
    if level != "v3":
        return {}  # v4 is not the whole of what such a processor has: compiled for itself, as users have it
    # Built for it, or, where the library has other levels only, compiled on the spot for it.
    return {"CKPTDIFF_KERNELS": "v3", "NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": ""}


def chosen(text: str) -> Sequence[str]:
    """Levels in a comma-separated list.

    Raises
    ------
    SystemExit
        If this processor lacks one.
    """
    there = levels_here()
    asked = text.split(",")
    missing = [name for name in asked if name not in there]
    if missing:
        raise SystemExit(f"this processor has no {', '.join(missing)} (it has {', '.join(there)})")
    return asked
