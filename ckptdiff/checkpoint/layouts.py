"""Stub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptdiff.checkpoint.weights import Assembled, Source


@dataclass
class Assembly:
    """Stub."""

    found: dict[str, Assembled] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def assemble(base: Mapping[str, Source], tuned: Mapping[str, Source]) -> Assembly:
    """Stub."""
    return Assembly()
