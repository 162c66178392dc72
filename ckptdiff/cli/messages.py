"""Print lines on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from ckptdiff.report.text import safe

__all__ = ["say", "warn"]


def say(text: str) -> None:
    """Print a line on stderr; none if it is closed, where ``print`` would write to stdout and spoil a report."""
    if sys.stderr is not None:
        print(f"ckptdiff: {text}", file=sys.stderr)


def warn(warnings: Iterable[str]) -> None:
    """Print each warning as a line of its own, safe to look at."""
    for warning in warnings:
        say(f"warning: {safe(warning)}")
