"""Safetensors files as bytes, written and read without ckptdiff and without the safetensors library."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BITS = {"F64": 64, "I64": 64, "C64": 64, "F32": 32, "I32": 32, "BF16": 16, "F16": 16, "BOOL": 8, "F4": 4}
BITS |= {"F8_E4M3": 8, "F8_E5M2": 8}


class Stored(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def random_tensor(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Stored:
    return Stored(dtype, shape, rng.bytes(math.prod(shape) * BITS[dtype] // 8))


def write(path: Path, tensors: Mapping[str, Stored], metadata: dict[str, str] | None = None) -> Path:
    header: dict[str, Any] = {}
    stop = 0
    for name, tensor in tensors.items():
        start, stop = stop, stop + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, stop]}
    # Neither the order of the names nor what stands around the header is as libraries write it.
    header = dict(reversed(header.items()))
    if metadata is not None:
        header["__metadata__"] = metadata
    text = json.dumps(header, indent=1).encode() + b"   "
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensor.data for tensor in tensors.values()))
    return path


def header_of(path: Path) -> bytes:
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(struct.unpack("<Q", length)[0])


def read(path: Path) -> dict[str, Stored]:
    """The tensors of a file, or of all files in a folder."""
    if path.is_dir():
        return {name: tensor for file in path.glob("*.safetensors") for name, tensor in read(file).items()}
    raw, header = path.read_bytes(), header_of(path)
    entries = json.loads(header[8:])
    entries.pop("__metadata__", None)
    return {
        name: Stored(
            entry["dtype"], tuple(entry["shape"]), raw[len(header) + start : len(header) + entry["data_offsets"][1]]
        )
        for name, entry in entries.items()
        for start in entry["data_offsets"][:1]
    }


def metadata_of(base: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """What a patch of a base says about itself."""
    files = sorted(base.glob("*.safetensors")) if base.is_dir() else [base]
    shards = [
        {
            "file": file.name,
            "size": os.stat(file).st_size,  # noqa: PTH116
            "header_sha256": hashlib.sha256(header_of(file)).hexdigest(),
        }
        for file in files
    ]
    return {
        "format": "ckptdiff-patch",
        "rule": "bitwise",
        "compare": "stored",
        "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()}),
        "base": json.dumps(shards),
        "tuned": "[]",
    }


def write_patch(path: Path, base: Path, changes: Mapping[str, tuple[np.ndarray, bytes]]) -> Path:
    """A patch of {name: (indices, bytes of the values)}."""
    known = read(base)
    entries = {}
    for name, (indices, values) in changes.items():
        wide = "I64" if indices.dtype == np.int64 else "I32"
        entries[f"{name}.indices"] = Stored(wide, indices.shape, indices.tobytes())
        entries[f"{name}.values"] = Stored(known[name].dtype, indices.shape, values)
    return write(path, entries, metadata_of(base, {name: known[name].shape for name in changes}))


def patched(tensor: Stored, indices: np.ndarray, values: bytes) -> Stored:
    """The oracle: elements as rows of bytes, some of them replaced."""
    rows = np.frombuffer(tensor.data, np.uint8).reshape(-1, BITS[tensor.dtype] // 8).copy()
    rows[indices] = np.frombuffer(values, np.uint8).reshape(len(indices), rows.shape[1])
    return tensor._replace(data=rows.tobytes())
