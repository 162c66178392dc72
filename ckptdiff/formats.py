"""Choose what a pair of stored dtypes is compared as, and say what the codes of each dtype mean."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Format:
    """A sign-magnitude floating format."""

    name: str
    """Lower-case name, as printed."""
    bits: int
    """Width of a code."""
    infinite: int
    """Magnitude (sign bit removed) of the first code that is not finite."""
    nan: int
    """Magnitude of the first code that is NaN."""

    @property
    def magnitude(self) -> int:
        """Mask of the magnitude bits of a code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def code_dtype(self) -> np.dtype[np.unsignedinteger]:
        """Unsigned NumPy dtype of the stored codes."""
        return np.dtype(f"u{self.bits // 8}")

    @property
    def real(self) -> np.dtype[Any]:
        """What d is computed in: float64 for codes of 64 bits, else float32."""
        return np.dtype(np.float64 if self.bits == 64 else np.float32)

    def values(self) -> NDArray[np.float32]:
        """Value of every code of a format of at most 16 bits, shape (2**bits,); NaN payloads are not kept."""
        return _values(self.name)


FORMATS = {
    format.name: format
    for format in (
        Format("bf16", 16, 0x7F80, 0x7F81),
        Format("f16", 16, 0x7C00, 0x7C01),
        Format("f8_e4m3", 8, 0x7F, 0x7F),
        Format("f8_e5m2", 8, 0x7C, 0x7D),
        Format("f32", 32, 0x7F80_0000, 0x7F80_0001),
        Format("f64", 64, 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0001),
    )
}
"""Every format by name."""

Formats: TypeAlias = tuple[Format, Format, Format]
"""Stored in the base, stored in the tuned side, compared as."""


def stored_format(dtype: str) -> Format:
    """The format of a floating dtype as a header spells it: "F8_E4M3" is "f8_e4m3"."""
    return FORMATS[dtype.lower()]


@cache
def _values(name: str) -> NDArray[np.float32]:
    if name == "bf16":
        values = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    elif name == "f16":
        with np.errstate(invalid="ignore"):  # signalling NaN
            values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    elif name == "f8_e5m2":  # the upper half of a float16
        with np.errstate(invalid="ignore"):
            values = (np.arange(1 << 8, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)
    elif name == "f8_e4m3":
        values = _e4m3_values()
    else:
        raise ValueError(f"{name} has too many codes for a table")
    values.flags.writeable = False
    return values


def _e4m3_values() -> NDArray[np.float32]:
    """OCP FP8 E4M3: bias 7, no infinity, NaN where all magnitude bits are set."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    fraction = np.where(exponent == 0, mantissa / 8, 1 + mantissa / 8)
    magnitude = np.ldexp(fraction, np.maximum(exponent, 1) - 7)
    magnitude = np.where(codes & 0x7F == 0x7F, np.nan, magnitude)
    return np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)


@cache
def recode_table(stored: Format, compare: Format) -> NDArray[np.unsignedinteger]:
    """Code in ``compare`` of every code of a stored format of at most 16 bits, shape (2**stored.bits,).

    Rounds to nearest even; under bfloat16 a NaN becomes the quiet NaN of its sign.
    """
    values = stored.values()
    table: NDArray[np.unsignedinteger]
    if stored == compare:
        table = np.arange(1 << stored.bits, dtype=np.uint16)
    elif compare.name == "bf16":
        table = round_to_bf16(values.view(np.uint32))
    else:
        real = {"f16": np.float16, "f32": np.float32, "f64": np.float64}[compare.name]
        with np.errstate(invalid="ignore"):  # a signalling NaN
            table = values.astype(real).view(compare.code_dtype)
    table.flags.writeable = False
    return table


def round_to_bf16(codes: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """Bfloat16 codes of float32 codes, rounded to nearest even; NaN becomes the quiet NaN of its sign."""
    with np.errstate(over="ignore"):
        rounded = (codes + np.uint32(0x7FFF) + (codes >> 16 & 1)) >> 16
    quiet_nan = (codes >> 16 & 0x8000) | 0x7FC0
    return np.where(codes & 0x7FFF_FFFF > 0x7F80_0000, quiet_nan, rounded).astype(np.uint16)


def common_format(base: Format, tuned: Format) -> Format:
    """The smallest format that holds every value of both."""
    if base == tuned:
        return base
    narrow, wide = sorted((base, tuned), key=lambda format: format.bits)
    if wide.bits >= 32:
        return wide
    if wide.bits == 16:  # bfloat16 and float16 both hold every float8 value
        return wide if narrow.bits == 8 else FORMATS["f32"]
    return FORMATS["bf16"]


def compare_format(base: Format, tuned: Format, compare: str) -> Format:
    """What a pair is cast to before it is compared, under "bf16" or "stored".

    Under "bf16" everything of 16 bits and more becomes bfloat16; two tensors of the same 8-bit format stay what they
    are.
    """
    if compare == "stored" or (base == tuned and base.bits == 8):
        return common_format(base, tuned)
    return FORMATS["bf16"]


@cache
def formats_of(base: str, tuned: str, compare: str) -> Formats:
    """Formats of two floating dtypes as headers spell them, and what the pair is compared as."""
    stored = stored_format(base), stored_format(tuned)
    return *stored, compare_format(*stored, compare)


def is_wide(stored: Format, compare: Format) -> bool:
    """Whether a stored format holds values that the compare format does not."""
    return common_format(stored, compare) != compare
