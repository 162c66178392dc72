"""Convert bfloat16 codes to those of float32 and back, one at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.jit import helper


@helper
def bf16_to_f32(code: Any) -> Any:
    """Float32 code of a bfloat16 code, which is its upper half."""
    return np.uint32(np.uint32(code) << np.uint32(16))


@helper
def round_to_bf16(code: Any) -> Any:
    """Bfloat16 code of a float32 code, to nearest even; NaN becomes the quiet NaN of its sign."""
    rounded = np.uint32(code + np.uint32(0x7FFF) + ((code >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = ((code >> np.uint32(16)) & np.uint32(0x8000)) | np.uint32(0x7FC0)
    return np.uint16(quiet if (code & np.uint32(0x7FFF_FFFF)) > np.uint32(0x7F80_0000) else rounded)
