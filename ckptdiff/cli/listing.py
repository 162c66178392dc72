"""Print lists of things that are no diff: rows of plain values in the formats of a listing."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

import click

from ckptdiff.report.text import dumps, safe

format_option = click.option(
    "--format", type=click.Choice(["table", "json", "ndjson", "csv"]), default="table", help="Format of the list."
)


def write_rows(
    stream: TextIO, form: str, rows: Sequence[Mapping[str, Any]], keys: Iterable[str], whole: Mapping[str, Any]
) -> None:
    """Write rows as csv under some keys, as a JSON line each (ndjson), or as the last key of a JSON object, `whole`."""
    if form == "json":
        stream.write(dumps({**whole, "tensors": list(rows)}) + "\n")
    elif form == "ndjson":
        stream.writelines(dumps(row) + "\n" for row in rows)
    else:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(columns := list(keys))
        table.writerows([[_cell(row[key]) for key in columns] for row in rows])


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return "x".join(map(str, value))
    return safe(value) if isinstance(value, str) else value
