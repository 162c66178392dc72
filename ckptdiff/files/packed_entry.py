"""Pack plain facts, arrays and bytes into the parts of one entry, and take them out again, bit for bit."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from operator import index
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_LENGTH = struct.Struct("<I")


class Unpacked(NamedTuple):
    """What was packed."""

    facts: dict[str, Any]
    """Plain JSON values; floats come out as they went in."""
    arrays: dict[str, NDArray[Any]]
    payloads: list[bytes]


def pack(facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], payloads: Sequence[bytes] = ()) -> list[bytes]:
    """Pack an entry; counts take the fewest bytes that hold all of an array."""
    shapes, parts = [], []
    for name, values in arrays.items():
        stored = np.ascontiguousarray(values, _narrow(values))
        shapes.append((name, values.dtype.str, stored.dtype.str, values.shape))
        parts.append(stored.tobytes())
    described = {"facts": facts, "arrays": shapes, "payloads": list(map(len, payloads))}
    text = json.dumps(described, default=index).encode()  # NumPy's integers are no int
    return [_LENGTH.pack(len(text)), text, *parts, *payloads]


def unpack(data: bytes) -> Unpacked:
    """Take out what :func:`pack` made; arrays are new ones, and may be written to."""
    (length,) = _LENGTH.unpack_from(data)
    offset = _LENGTH.size + length
    described = json.loads(data[_LENGTH.size : offset])
    arrays = {}
    for name, dtype, stored, shape in described["arrays"]:
        found = np.frombuffer(data, stored, math.prod(shape), offset)
        arrays[name] = found.reshape(shape).astype(dtype)
        offset += found.nbytes
    payloads = []
    for size in described["payloads"]:
        payloads.append(data[offset : offset + size])
        offset += size
    return Unpacked(described["facts"], arrays, payloads)


def _narrow(values: NDArray[Any]) -> np.dtype[Any]:
    """The smallest unsigned type for integers of none below zero; else their own."""
    if values.dtype.kind not in "iu" or not values.size or values.min() < 0:
        return values.dtype
    return np.min_scalar_type(int(values.max()))
