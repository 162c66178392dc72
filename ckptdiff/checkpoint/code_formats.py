"""Say what the codes of quantised weights are."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CODES", "Code"]


class Code(NamedTuple):
    """What kernels know of a format of codes. The last five are of floating ones, magnitudes without their sign bit."""

    bits: int
    floats: bool
    magnitude: int
    """Mask of the bits that are zero in a zero."""
    mantissa: int
    """Bits of the mantissa."""
    bias: int
    """To be added to the exponent in float32."""
    normal: int
    """The first magnitude that is not subnormal."""
    infinite: int
    nan: int
    """The first ones that are infinite, and NaN."""


CODES = {
    "e4m3": Code(8, True, 0x7F, 3, 120, 0x08, 0x7F, 0x7F),
    "e5m2": Code(8, True, 0x7F, 2, 112, 0x04, 0x7C, 0x7D),
    "e2m1": Code(4, True, 0x07, 1, 126, 0x02, 0x08, 0x08),
    **{f"int{bits}": Code(bits, False, 0xFF, 0, 0, 0, 0, 0) for bits in range(1, 9)},
}
"""Every format by name: OCP FP8 and FP4, and fields of integers."""
