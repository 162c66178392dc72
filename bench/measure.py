"""Run commands and files under the clock: wall time, peak resident memory, page cache, disk rate."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

# A child's ru_maxrss starts at the resident size of the process that forked it, so commands are started by a
# small process of their own; its own start is not in the time.
LAUNCHER = """
import json, os, sys, time
begun = time.perf_counter()
child = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, used = os.wait4(child, 0)
seconds = time.perf_counter() - begun
with open(sys.argv[1], "w") as report:
    spent = used.ru_utime + used.ru_stime
    json.dump([seconds, spent, used.ru_maxrss * 1024, os.waitstatus_to_exitcode(status)], report)
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One finished command: seconds by the clock and of processors, bytes, standard output."""

    seconds: float
    cpu: float
    peak_rss: int
    output: str


def run(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end.

    Raises
    ------
    SystemExit
        If it fails; what it wrote to standard error is shown.
    """
    argv = [str(part) for part in command]
    temporary = tempfile.TemporaryFile
    with tempfile.TemporaryDirectory() as folder, temporary() as out, temporary() as err:
        report = Path(folder, "report.json")
        launch = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(report), *argv]
        subprocess.run(launch, stdout=out, stderr=err, env={**os.environ, **(env or {})}, check=True)
        seconds, cpu, peak_rss, code = json.loads(report.read_text())
        out.seek(0)
        err.seek(0)
        if code:
            raise SystemExit(f"{' '.join(argv)}\nended with {code}:\n{err.read().decode(errors='replace')}")
        return Run(seconds, cpu, peak_rss, out.read().decode())


def write_json(path: Path, value: object) -> None:
    """Write a JSON file that is whole at any moment: the new one takes the place of the old one at once."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    beside.replace(path)


def drop_cache(paths: Iterable[Path]) -> None:
    """Drop the files from the page cache; what is still to be written is written first."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sequential_read(paths: Iterable[Path]) -> float:
    """Seconds to read the files from end to end, 8 MiB at a time."""
    buffer = memoryview(bytearray(8 << 20))
    begun = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begun


def median(runs: Iterable[Run]) -> float:
    """Median seconds."""
    return statistics.median(run.seconds for run in runs)


def peak(runs: Iterable[Run]) -> int:
    """Largest peak resident size."""
    return max(run.peak_rss for run in runs)


def machine() -> dict[str, Any]:
    """Say what the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in _lines(cpuinfo) if line.startswith("model name")]
    versions: dict[str, str | None] = {}
    for package in ("ckptdiff", "numpy", "numba", "h5py", "torch"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": versions,
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned text; numbers to three digits, missing values as a dash."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [heads, *([_cell(row.get(head)) for head in heads] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *rest in cells:
        padded = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(["", first.ljust(widths[0]), *padded]).rstrip())
    return "\n".join([title, *lines] if title else lines) + "\n"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table in Markdown, numbers to three digits; a column for every key that is in any row."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines = [heads, ["---"] * len(heads), *([_cell(row.get(head)) for head in heads] for row in rows)]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return str(value)
