"""Spell names and numbers for a screen, and JSON for every parser. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NOT_AVAILABLE = "n/a"
"""What stands for a figure that is undefined."""


def safe(name: str) -> str:
    r"""Escape what could move the cursor, colour the screen, break the line or reorder the text.

    Checkpoints name their tensors, and a name may hold ESC, newlines, bidi overrides or lone surrogates. Whatever
    Unicode does not call printable is written as ``\x1b``, ``\u202e`` or ``\U000e0041``; the rest, markup of any
    kind included, is left as it is, because no report interprets it.
    """
    if name.isprintable():
        return name
    return "".join(char if char.isprintable() else _escape(char) for char in name)


def _escape(char: str) -> str:
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def percent(fraction: float | None) -> str:
    """Spell a fraction in percent: two digits of what is small, and one of what little is missing to 100 %.

    "0 %" and "100 %" are exactly that, but for the rounding of float64: 0.99999 reads "99.999 %", never "100.0 %".
    """
    if fraction is None or not math.isfinite(fraction):
        return NOT_AVAILABLE
    value, rest = 100.0 * fraction, 100.0 * (1.0 - fraction)
    if value == 0.0:
        return "0 %"
    if abs(rest) < 1e-12:
        return "100 %"
    if abs(value) < 1e-3:
        return f"{value:.1e} %"
    if abs(value) >= 1000.0:
        return f"{value:,.0f} %"
    return f"{value:.{max(1, _decimals(value) + 1, _decimals(rest))}f} %"


def _decimals(value: float) -> int:
    """Decimals up to the first digit of a value below 1."""
    return -int(f"{abs(value):.2e}".partition("e")[2]) if abs(value) < 1.0 else 0


def number(value: float | None) -> str:
    """Spell a number with three significant digits; whole counts in full."""
    if value is None or not math.isfinite(value):
        return NOT_AVAILABLE
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def quantity(count: int) -> str:
    """Spell a count of values as "22.7 M"; up to 9,999 in full."""
    if count < 10_000:
        return f"{count:,}"
    return _scaled(count, 1000.0, ("", " k", " M", " B", " T"))


def size(count: float) -> str:
    """Spell a number of bytes in powers of 1000, as disks and model hubs do: "2.15 GB"."""
    return _scaled(count, 1000.0, (" B", " kB", " MB", " GB", " TB", " PB"))


def binary_size(count: float) -> str:
    """Spell a number of bytes in powers of 1024, as ``--max-memory`` takes them: "400 MiB"."""
    return _scaled(count, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def _scaled(count: float, step: float, units: tuple[str, ...]) -> str:
    value = float(count)
    for unit in units[:-1]:
        # 999.5 would be spelled "1e+03" of its own unit.
        if abs(value) < min(step, 999.5):
            return f"{value:.3g}{unit}"
        value /= step
    return f"{value:,.3g}{units[-1]}" if abs(value) < 999.5 else f"{value:,.0f}{units[-1]}"


def duration(seconds: float) -> str:
    """Spell a time: "17 s", "2 min 05 s", "1 h 03 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def shape_text(shape: tuple[int, ...]) -> str:
    """Spell a shape: "512x64", "7", "scalar"."""
    return "x".join(map(str, shape)) or "scalar"


def dumps(value: Any, *, compact: bool = False) -> str:
    """JSON text on one line, strictly valid and in ASCII: NaN and infinities become null."""
    import json  # every start of the program comes by this module, few print JSON

    separators = (",", ":") if compact else (", ", ": ")
    try:
        return json.dumps(value, allow_nan=False, separators=separators)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, separators=separators)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
