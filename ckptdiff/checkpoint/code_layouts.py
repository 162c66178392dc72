"""List the layouts in which quantised weights are stored."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BESIDE", "FP8", "LAYOUTS", "CodeLayout"]

FP8 = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
_REALS = frozenset({"F32", "BF16", "F16"})
_POWERS = frozenset({"U8", "F8_E8M0"})
BESIDE = ("_scale", "_scale_inv", ".scale")
"""What the scales of fp8 are called; DeepSeek's own name is that of the module and "scale"."""


@dataclass(frozen=True, slots=True)
class CodeLayout:
    """One row: how an encoding is stored. Names are what follows the name of the weight."""

    encoding: str
    codes: str
    dtypes: frozenset[str]
    code: str | None
    """None: by the dtype, or by what else is stored."""
    scales: tuple[str, ...]
    scale_dtypes: frozenset[str]
    group: int | None = None
    """Columns to a scale, if the format says so."""
    global_scale: str | None = None
    divides: bool = False
    zeros: bool = False
    """Whether there may be zero points."""
    method: str | None = None
    """The method that has to be named, where nothing else tells."""


LAYOUTS = (
    CodeLayout(
        "NVFP4", "_packed", frozenset({"U8"}), "e2m1", ("_scale",), frozenset({"F8_E4M3"}), 16, "_global_scale", True
    ),
    CodeLayout("NVFP4", "", frozenset({"U8"}), "e2m1", ("_scale",), frozenset({"F8_E4M3"}), 16, "_scale_2"),
    CodeLayout("MXFP4", "_packed", frozenset({"U8"}), "e2m1", ("_scale",), _POWERS, 32),
    CodeLayout("MXFP4", "_blocks", frozenset({"U8"}), "e2m1", ("_scales",), _POWERS, 32),
    CodeLayout("MXFP4", "", frozenset({"U8", "I8"}), "e2m1", BESIDE, _POWERS, 32),
    CodeLayout("FP4", "", frozenset({"I8"}), "e2m1", ("_scale_inv", ".scale"), _REALS, 32),
    CodeLayout("MXFP8", "", frozenset(FP8), None, BESIDE, _POWERS, 32),
    CodeLayout("FP8", "", frozenset(FP8), None, BESIDE, _REALS | {"F8_E8M0"}),
    CodeLayout("INT", "_packed", frozenset({"I32"}), None, ("_scale",), _REALS, zeros=True),
    CodeLayout("INT", "", frozenset({"I8"}), "int8", ("_scale",), _REALS, zeros=True, method="compressed-tensors"),
)
"""Tried from above: the first row whose names, dtypes and shapes fit is that of a tensor."""
