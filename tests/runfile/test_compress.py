from __future__ import annotations

import zlib

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptdiff.deflate.deflate import deflate
from ckptdiff.runfile.compress import DEFLATED, RAW, compress_chunk
from ckptdiff.runfile.schema import MASK_CHUNK

BLOCK = 1 << 20
ROWS, WIDTH = 256, 4096


def packed(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits.ravel(), bitorder="little")


def structured() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    noise = rng.random((ROWS, WIDTH))
    rows, columns = rng.random((ROWS, 1)), rng.random((1, WIDTH))
    masks = {f"density {p}": noise < p for p in (0.0001, 0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.9, 0.99)}
    masks |= {
        "frozen rows": (rows < 0.3) & (noise < 0.2),
        "density by row": noise < rows**4,
        "density by column": noise < columns**4,
        "whole rows": (rows < 0.1) & (noise < 2),
        "whole columns": (columns < 0.1) & (noise < 2),
        "most of some columns": (columns < 0.1) & (noise < 0.98),
        "half of a few columns": (columns < 0.01) & (noise < 0.5),
        "columns of an odd width": np.tile(rng.random(1000) < 0.1, 1048),
        "rows of an embedding": (rows < 0.01) & (noise < 0.9),
        "heads": np.repeat(columns[:, ::64] < 0.2, 64, axis=1) & (noise < 0.2),
        "blocks": np.repeat(rng.random(BLOCK // 32) < 0.2, 32),
        "full": noise < 2,
    }
    return masks


@pytest.mark.parametrize("name", structured())
def test_no_larger_than_zlib_level_6(name: str) -> None:
    chunk = packed(structured()[name])
    payload, filter_mask = compress_chunk(chunk, chunk.size)
    assert (payload if filter_mask == RAW else zlib.decompress(payload)) == chunk.tobytes()
    assert len(payload) <= len(zlib.compress(chunk, 6))


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]), st.integers(1, 5000), st.integers(0, 3000))
def test_chunks_of_every_size_come_back(seed: int, density: float, size: int, padding: int) -> None:
    chunk = np.packbits(np.random.default_rng(seed).random(8 * size) < density)
    payload, filter_mask = compress_chunk(chunk, size + padding)
    data = payload if filter_mask == RAW else zlib.decompress(payload)
    assert data == chunk.tobytes() + bytes(padding)
    assert len(payload) <= size + padding or filter_mask == DEFLATED


def test_random_bits_are_stored_as_they_are() -> None:
    chunk = np.random.default_rng(0).integers(0, 256, MASK_CHUNK, dtype=np.uint8)
    assert compress_chunk(chunk, MASK_CHUNK) == (chunk.tobytes(), RAW)


def test_zeros_are_compressed_once() -> None:
    payload, filter_mask = compress_chunk(np.zeros(MASK_CHUNK, np.uint8), MASK_CHUNK)
    assert filter_mask == DEFLATED
    assert zlib.decompress(payload) == bytes(MASK_CHUNK)
    assert compress_chunk(np.zeros(5, np.uint8), MASK_CHUNK)[0] is payload


def test_hdf5_decompresses_the_chunks() -> None:
    chunk = packed(structured()["density 0.1"])
    payload, filter_mask = compress_chunk(chunk[:100_000], MASK_CHUNK)
    with h5py.File("in memory", "w", driver="core", backing_store=False) as file:
        dataset = file.create_dataset("m", (100_000,), np.uint8, chunks=(100_000,), compression="gzip")
        shorter, mask = compress_chunk(chunk[:100_000], 100_000)
        dataset.id.write_direct_chunk((0,), shorter, mask)
        np.testing.assert_array_equal(dataset[:], chunk[:100_000])
    assert filter_mask == DEFLATED
    assert zlib.decompress(payload)[:100_000] == chunk[:100_000].tobytes()


def repeats(bits: np.ndarray) -> bool:
    chunk = packed(bits)
    chunk.setflags(write=False)
    return deflate(chunk, chunk.size).repeats


def test_repeats_are_seen_in_masks_of_columns_and_not_in_noise() -> None:
    masks = structured()
    assert all(repeats(masks[name]) for name in ("whole columns", "most of some columns", "columns of an odd width"))
    assert not any(repeats(mask) for name, mask in masks.items() if name.startswith("density"))


@given(st.binary(min_size=1, max_size=300))
def test_repeats_of_short_masks_stay_in_bounds(data: bytes) -> None:
    chunk = np.frombuffer(data, np.uint8)
    if deflate(chunk, chunk.size).repeats:
        assert len(set(data)) <= 4 or any(data[i : i + 4] in data[i + 1 :] for i in range(len(data)))
