"""Stored chunks beside other threads that use HDF5, which not every version of h5py keeps apart."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np

from ckptdiff.runfile.direct_chunks import read_chunk, write_chunk

CHUNK, CHUNKS = 1024, 16


def test_chunks_are_read_and_written_while_others_use_hdf5(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, CHUNK * CHUNKS, np.uint8)

    def use(thread: int) -> None:
        with h5py.File(tmp_path / f"{thread}.h5", "w") as file:
            for turn in range(100):
                dataset = file.create_dataset(f"{turn}", values.shape, np.uint8, chunks=(CHUNK,), compression="gzip")
                for first in range(0, values.size, CHUNK):
                    write_chunk(dataset.id, (first,), zlib.compress(values[first : first + CHUNK].tobytes()))
                assert (dataset[...] == values).all()
                for first in range(0, values.size, CHUNK):
                    _, stored = read_chunk(dataset.id, (first,))
                    assert zlib.decompress(stored) == values[first : first + CHUNK].tobytes()
                dataset.attrs["turn"] = turn

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))
