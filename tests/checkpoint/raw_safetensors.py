"""Safetensors bytes made by hand, so that tests can make wrong ones too."""

import json
import struct
from pathlib import Path

SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


def raw(header, data=b"", *, length=None):
    """A file of this header (an object, or bytes taken as they are) and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def header_of(tensors, metadata=None):
    """The header of tensors given as {name: (dtype, shape)}, laid out in that order, and their bytes' number."""
    header = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + SIZES[dtype] * _product(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return header, end


def write(path, tensors, metadata=None):
    """Write such tensors, filled with counting bytes; returns the path as text."""
    header, size = header_of(tensors, metadata)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(raw(header, bytes(index % 251 for index in range(size))))
    return str(path)


def write_index(path, weight_map, **metadata):
    """Write an index; returns the path as text."""
    Path(path).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    return str(path)


def _product(shape):
    result = 1
    for size in shape:
        result *= size
    return result
