"""Name everything that a run file holds, and say how it is stored.

::

    /                attributes format, format_version, ckptdiff_version, title, complete
    /provenance      JSON text: both sides, options, compare dtype, mask rule, how it ran, warnings
    /unmatched       JSON text: only_in_base, only_in_tuned, aliased, mismatched, suggested_map
    /layouts         JSON text, if some tensors are not stored alike: by name pieces, rows, untied, and kept of
                     quantised ones
    /tensors/name    one name per compared tensor, in plan order: the dimension scale of the columns
    /tensors/*       one 1-D dataset per fact (shape, dtype_base, layer, ...) and per column of the catalogue
    /histograms/*    delta_log2, base_log2, changed_log2 [tensors, 279] and ulp [tensors, 64], uint64, on the scales
                     name, log2_floor and ulp_floor
    /tensors/spectral_*, /spectra/<name>/*
                     only if spectra were measured: their figures, and the singular values that are known of each tensor
                     (delta, base, tuned, angles_left, angles_right); of several matrices the figures of each too
    /masks           attributes rule, compare, bit_order
    /masks/<name>    bit-packed mask of one tensor, uint8, with the attribute shape
"""

from __future__ import annotations

import re
from typing import Final

FORMAT: Final = "ckptdiff-run"
FORMAT_VERSION: Final = 1
HDF5_SIGNATURE: Final = b"\x89HDF\r\n\x1a\n"
"""The first bytes of any HDF5 file."""
BIT_ORDER: Final = "little"
MASK_CHUNK: Final = 1 << 17
"""Bytes of a full mask chunk: one bit for each of the 2^20 coordinates of a block."""

TEXT_FACTS: Final = {
    "tuned_name": "name on the tuned side",
    "shape": "shape, as JSON",
    "dtype_base": "dtype stored in the base",
    "dtype_tuned": "dtype stored in the tuned side",
    "compare": "dtype both sides were cast to",
    "tower": "tower: language, encoder, decoder, vision, audio, projector",
    "module_type": "module type",
    "block": "block: attention, ffn, mixer, conv, modulation, projector, embedding, head, norm, router, other",
    "groups": "the user's own groups, as JSON",
}
"""String columns of ``/tensors`` beside ``name``."""

HISTOGRAMS: Final = {
    "delta_log2": ("delta", "coordinates finite on both sides, by floor(log2 |d|)"),
    "base_log2": ("base", "coordinates with a finite base, by floor(log2 |W0|)"),
    "changed_log2": ("changed", "those of base_log2 that changed bitwise"),
    "ulp": ("ulp", "changed coordinates by floor(log2) of their distance in units in the last place"),
}
"""Dataset of ``/histograms`` to its field of ``HistogramRows`` and its long name."""

_UNSAFE_IN_LINK = re.compile(r"[%/\x00-\x1f\x7f]|^\.")
_UNSAFE_IN_TEXT = re.compile(r"[%\x00]")


def packed_bytes(numel: int) -> int:
    """Bytes of a bit-packed mask of `numel` coordinates."""
    return (numel + 7) // 8


def mask_chunk_bytes(numel: int) -> int:
    """Bytes of each chunk of the mask of a tensor with `numel` coordinates, before compression."""
    return min(packed_bytes(numel), MASK_CHUNK)


def mask_chunks(numel: int) -> int:
    """How many chunks that mask has."""
    return -(-packed_bytes(numel) // MASK_CHUNK)


def escape_name(name: str) -> str:
    """Spell a tensor name as the name of an HDF5 link.

    ``%``, ``/``, a leading ``.``, and the characters below 0x20 and 0x7f are percent-encoded; the empty name is ``%``.
    """
    # A name without control characters, as nearly all are, needs no search.
    if name.isprintable() and not ("%" in name or "/" in name or name.startswith(".")):
        return name or "%"
    return _UNSAFE_IN_LINK.sub(_percent, name)


def escape_text(text: str) -> str:
    """Spell a string for a string dataset, which cannot hold NUL: ``%`` and NUL are percent-encoded."""
    return _UNSAFE_IN_TEXT.sub(_percent, text) if "%" in text or "\0" in text else text


def unescape(text: str) -> str:
    """Undo :func:`escape_name` and :func:`escape_text`."""
    if "%" not in text:
        return text
    return "" if text == "%" else re.sub("%([0-9A-F]{2})", lambda match: chr(int(match[1], 16)), text)


def _percent(match: re.Match[str]) -> str:
    return f"%{ord(match[0]):02X}"
