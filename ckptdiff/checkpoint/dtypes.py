"""List the dtypes that a safetensors header can name, and what can be said about values stored in them."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["DTYPES", "DType", "Kind"]


class Kind(enum.Enum):
    """What a stored dtype allows to be measured.

    ``FLOAT`` values are decoded and subtracted. ``INTEGER`` and ``OPAQUE`` ones are only compared bit by bit:
    a difference of token ids or of packed codes has no meaning as an update.
    """

    FLOAT = "float"
    INTEGER = "integer"
    OPAQUE = "opaque"


@dataclass(frozen=True, slots=True)
class DType:
    """One stored dtype.

    Attributes
    ----------
    name : str
        As the header spells it, for example ``"BF16"``.
    bits : int
        Size of one element, in bits; 4 and 6 occur.
    kind : Kind
        What can be measured on it.
    """

    name: str
    bits: int
    kind: Kind


_BITS = {
    Kind.FLOAT: {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8},
    Kind.INTEGER: {
        "I64": 64,
        "I32": 32,
        "I16": 16,
        "I8": 8,
        "U64": 64,
        "U32": 32,
        "U16": 16,
        "U8": 8,
        "BOOL": 8,
    },
    Kind.OPAQUE: {
        "C64": 64,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "F8_E8M0": 8,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "F4": 4,
    },
}

DTYPES: Mapping[str, DType] = MappingProxyType(
    {name: DType(name, bits, kind) for kind, names in _BITS.items() for name, bits in names.items()}
)
"""Every dtype of the safetensors format (library 0.8), by the name its header uses."""
