"""The history of `compare.py`: a line of a CSV file for each run and instruction set, which docs/speed.md shows.

Seconds of two lines say little, since machines differ and others use them; ratios were measured side by side.
"""

from __future__ import annotations

import csv
import datetime
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HISTORY = Path(__file__).parent / "results" / "history.csv"

# Column, section, what its row or target is called, and the key of that row ("value": a ratio among the targets).
FIGURES = (
    ("diff -o, s", "main", "ckptdiff, masks", "seconds"),
    ("diff, s", "main", "ckptdiff --mask none", "seconds"),
    ("engine, s", "main", "engine in process, --mask none", "seconds"),
    ("engine with masks, s", "main", "engine in process, masks", "seconds"),
    ("read limit / engine", "main", "read limit / engine, --mask none", "value"),
    ("torch diff / diff -o", "main", "torch diff / ckptdiff, masks", "value"),
    ("peak MB", "main", "peak MB, masks", "value"),
    ("a byte of small tensors / of large", "tiny", "time per byte, small / Llama-shaped", "value"),
    ("fixture, s", "startup", "diff of a fixture, warm", "seconds"),
    ("fixture, first, s", "startup", "diff of a fixture, empty cache", "seconds"),
)
COLUMNS = ("date", "version", "processor", "cores", "level", "GiB a side", *(name for name, *_ in FIGURES))


def line(machine: Mapping[str, Any], level: str, sections: Mapping[str, Any], size: int) -> dict[str, str]:
    """One line: the figures of the sections that were measured, and nothing where one was not.

    ``sections`` holds sections as the JSON file has them; ``size`` is a side of the main pair in bytes.
    """
    found = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "version": machine["packages"]["ckptdiff"] or "",
        "processor": machine["processor"],
        "cores": str(machine["cores"]),
        "level": level,
        "GiB a side": f"{size / 2**30:.3g}",
    }
    for column, section, name, key in FIGURES:
        for row in _rows(sections.get(section, {})):
            if name in (row.get("what"), row.get("name")) and row.get(key) is not None:
                found[column] = f"{row[key]:.3g}"
    return found


def _rows(section: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    return [*section.get("rows", ()), *section.get("targets", ())]


def append(path: Path, lines: Iterable[Mapping[str, str]]) -> None:
    """Add lines to a history.

    Raises
    ------
    SystemExit
        If the file has other columns: it belongs to another version of this program.
    """
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            heads = next(csv.reader(file), [])
        if tuple(heads) != COLUMNS:
            raise SystemExit(f"{path} has other columns than this program writes; move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(lines)
