"""Write pairs of quantised weights, with NumPy alone.

    python bench/quantised_pair.py 256MiB /tmp/quantised    # /tmp/quantised/fp8 and /tmp/quantised/nvfp4

Each pair is OUT/LAYOUT/base and OUT/LAYOUT/tuned, of SIZE bytes of codes a side: fp8 with a scale for each block of 128
by 128, and two E2M1 codes to a byte with an e4m3 scale for sixteen of them and one of float32 for all. In the tuned
side a tenth of the bytes of codes moved by one step, and a tenth of the scales.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
from make_pair import parse_size

ROWS, COLUMNS, BLOCK, GROUP = 1000, 2048, 128, 16
"""Of a weight: its last blocks are not whole."""
MOVED = 0.1
ITEMSIZE = {"F8_E4M3": 1, "U8": 1, "F32": 4}
CONFIG = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
}
Tensors = dict[str, tuple[str, np.ndarray]]


def fp8(rng: np.random.Generator, name: str, rows: int) -> tuple[Tensors, Tensors]:
    """One weight of both sides."""
    codes = rng.integers(0, 0x60, (rows, COLUMNS), np.uint8) | rng.integers(0, 2, (rows, COLUMNS), np.uint8) << 7
    scales = rng.uniform(1e-4, 2e-4, (-(-rows // BLOCK), COLUMNS // BLOCK)).astype(np.float32)
    others = np.where(rng.random(scales.shape) < MOVED, scales * np.float32(1.01), scales)

    def side(codes: np.ndarray, scales: np.ndarray) -> Tensors:
        return {f"{name}.weight": ("F8_E4M3", codes), f"{name}.weight_scale_inv": ("F32", scales)}

    return side(codes, scales), side(_moved(rng, codes), others)


def nvfp4(rng: np.random.Generator, name: str, rows: int) -> tuple[Tensors, Tensors]:
    """One weight of both sides."""
    codes = rng.integers(0, 256, (rows, COLUMNS), np.uint8)  # of twice as many columns
    scales = rng.integers(0x38, 0x70, (rows, 2 * COLUMNS // GROUP), np.uint8)
    whole = np.full((), 1e-5, np.float32)

    def side(codes: np.ndarray, scales: np.ndarray) -> Tensors:
        stored = {"weight": ("U8", codes), "weight_scale": ("F8_E4M3", scales), "weight_scale_2": ("F32", whole)}
        return {f"{name}.{part}": values for part, values in stored.items()}

    return side(codes, scales), side(_moved(rng, codes), _moved(rng, scales))


LAYOUTS = {"fp8": fp8, "nvfp4": nvfp4}


def _moved(rng: np.random.Generator, codes: np.ndarray) -> np.ndarray:
    """A tenth of them by one step."""
    return codes ^ (rng.random(codes.shape, np.float32) < MOVED)


def write_side(folder: Path, layout: str, tensors: Tensors) -> None:
    """One file, and the configuration that says what its codes are."""
    folder.mkdir(parents=True)
    fields, at = {}, 0
    for name, (dtype, values) in tensors.items():
        stop = at + math.prod(values.shape) * ITEMSIZE[dtype]
        fields[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, values in tensors.values():
            file.write(np.ascontiguousarray(values).data)
    (folder / "config.json").write_text(json.dumps({"quantization_config": CONFIG[layout]}))


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Write pairs of quantised weights.")
    parser.add_argument("size", type=parse_size, help="codes of a side: 64MiB, 2GiB, ...")
    parser.add_argument("out", type=Path, help="folder that gets a folder for each layout")
    given = parser.parse_args()
    count, rows = max(1, given.size // (ROWS * COLUMNS)), min(ROWS, max(1, given.size // COLUMNS))
    for layout, make in LAYOUTS.items():
        rng = np.random.default_rng(0)
        base, tuned = {}, {}
        for number in range(count):
            one, other = make(rng, f"model.layers.{number}.mlp.up_proj", rows)
            base |= one
            tuned |= other
        write_side(given.out / layout / "base", layout, base)
        write_side(given.out / layout / "tuned", layout, tuned)


if __name__ == "__main__":
    main()
