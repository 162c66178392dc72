"""Matrices with known kinds of spectra, in memory and on disk, for `spectra.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def to_bf16(values: Any) -> Any:
    codes = np.ascontiguousarray(values, np.float32).view(np.uint32)
    codes = (codes + (0x7FFF + (codes >> 16 & 1)).astype(np.uint32)) >> 16 << 16
    return codes.view(np.float32)


def orthonormal(rng: Any, rows: int, columns: int) -> Any:
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def update(kind: str, rows: int, columns: int, rng: Any) -> Any:
    """An update of a kind of spectrum, tall, float32."""
    if kind in ("flat", "s1"):
        delta = rng.standard_normal((rows, columns), np.float32)
        if kind == "s1":
            few = min(32, columns)
            sizes = np.arange(1, few + 1) ** -0.5
            lead = ((orthonormal(rng, rows, few) * sizes) @ orthonormal(rng, columns, few).T).astype(np.float32)
            delta += lead * np.float32(0.5**0.5 * np.linalg.norm(delta) / np.linalg.norm(lead))
        return delta * np.float32(1e-5)
    places = np.arange(columns)
    values = {
        "power": (places + 1.0) ** -0.7,
        "exponential": np.exp(-places / 20),
        "low rank": np.where(places < 8, 2.0 - places / 8, 0.0),
        "deficient": np.where(places < columns - columns // 8, 1.0 / (1 + places / 50), 0.0),
    }[kind]
    return ((orthonormal(rng, rows, columns) * values) @ orthonormal(rng, columns, columns).T).astype(np.float32)


def pair_of(long: int, short: int) -> tuple[Any, Any]:
    """Weights on the bfloat16 grid and a rounded, sparse S1-like update of them."""
    rng = np.random.default_rng(0)
    weights = to_bf16(0.02 * rng.standard_normal((long, short), np.float32) * np.exp(-np.arange(short) / short))
    return weights, to_bf16(weights + update("s1", long, short, rng)) - weights


def write_embedding(sides: Sequence[Path], rows: int, columns: int) -> None:
    rng = np.random.default_rng(0)
    header = json.dumps(
        {
            "model.embed_tokens.weight": {
                "dtype": "BF16",
                "shape": [rows, columns],
                "data_offsets": [0, 2 * rows * columns],
            }
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    with sides[0].open("wb") as base, sides[1].open("wb") as tuned:
        for out in (base, tuned):
            out.write(len(header).to_bytes(8, "little") + header)
        for first in range(0, rows, 1024):
            weights = to_bf16(0.02 * rng.standard_normal((min(1024, rows - first), columns), np.float32))
            moved = to_bf16(weights + 1e-5 * rng.standard_normal(weights.shape, np.float32))
            for out, side in ((base, weights), (tuned, moved)):
                out.write((side.view(np.uint32) >> 16).astype(np.uint16).data)
