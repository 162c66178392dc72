"""Read the masks of a run file with h5py and NumPy alone.

    python examples/read_masks.py RUN.h5

prints of each tensor its shape, how many of its coordinates are in the mask, and the rows with most of them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import h5py
import numpy as np


def masks_of(path: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and mask of every tensor, a boolean array of the tensor's shape."""
    with h5py.File(path) as file:
        if file["masks"].attrs["rule"] == "none":
            sys.exit(f"{path} has no masks: its run was made with --mask none")
        # In the order of the checkpoint; HDF5 itself sorts the masks by name.
        for text in file["tensors/name"].asstr():
            name = decoded(text)
            mask = file["masks"][encoded(name)]
            shape = mask.attrs["shape"]
            bits = np.unpackbits(mask[:], bitorder="little", count=int(shape.prod()))
            yield name, bits.astype(bool).reshape(shape)


def encoded(name: str) -> str:
    """The name of an HDF5 link: `/` would separate groups, and a leading `.` means something else."""
    return re.sub(r"[%/\x00-\x1f\x7f]|^\.", lambda match: f"%{ord(match[0]):02X}", name) or "%"


def decoded(text: str) -> str:
    """A name from the column of names, where only `%` and NUL are encoded."""
    return "" if text == "%" else re.sub("%([0-9A-F]{2})", lambda match: chr(int(match[1], 16)), text)


def main() -> None:
    """Print a line for each mask."""
    for name, mask in masks_of(sys.argv[1]):
        line = f"{name:50} {'x'.join(map(str, mask.shape)):>9} {mask.sum():7,} in the mask"
        if mask.ndim == 2 and mask.any():
            rows = np.argsort(-mask.sum(axis=1), kind="stable")[:3]
            line += f", most in rows {', '.join(map(str, rows))}"
        print(line)


if __name__ == "__main__":
    main()
