"""The formats of a report, each one exporter behind one interface."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Literal, TextIO, TypeAlias, cast, get_args

from ckptdiff.figures.result import Diff
from ckptdiff.report.rows import View

Format: TypeAlias = Literal["table", "json", "ndjson", "csv", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)

Exporter: TypeAlias = Callable[[Diff, TextIO, View], None]
"""``write(diff, stream, view)``; parquet writes to ``stream.buffer``."""


def exporter(name: Format) -> Exporter:
    """The exporter of a format; its module, and rich or pyarrow with it, is imported only now."""
    return cast(Exporter, importlib.import_module(f"ckptdiff.report.as_{name}").write)
