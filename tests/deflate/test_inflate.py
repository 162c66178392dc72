"""zlib streams of every kind, read in compiled code: as zlib reads them, or refused."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptdiff.deflate.inflate import inflate
from ckptdiff.jit import kernel

DATA = st.one_of(
    st.binary(max_size=600),
    st.lists(st.integers(0, 3), max_size=3000).map(bytes),
    st.builds(lambda part, times: part * times, st.binary(min_size=1, max_size=40), st.integers(1, 2000)),
)
STRATEGIES = [zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED, zlib.Z_RLE, zlib.Z_HUFFMAN_ONLY]


@kernel
def inflate_one(data: np.ndarray, out: np.ndarray) -> bool:
    return inflate(data, out)


def read(stream: bytes, size: int) -> bytes | None:
    """What a stream holds, if it is one that holds so many bytes."""
    out = np.empty(size, np.uint8)
    return out.tobytes() if inflate_one(np.frombuffer(stream, np.uint8), out) else None


@settings(deadline=None, max_examples=300)
@given(DATA, st.integers(0, 9), st.sampled_from([9, 12, 15]), st.sampled_from(STRATEGIES), st.floats(0, 1))
def test_as_zlib_reads_it(data: bytes, level: int, window: int, strategy: int, cut: float) -> None:
    encoder, at = zlib.compressobj(level, zlib.DEFLATED, window, 8, strategy), int(cut * len(data))
    stream = encoder.compress(data[:at]) + encoder.flush(zlib.Z_FULL_FLUSH) + encoder.compress(data[at:])
    stream += encoder.flush()
    assert read(stream, len(data)) == data
    assert read(stream, len(data) + 1) is None
    assert read(stream + b"\0", len(data)) is None
    assert read(stream[:-1], len(data)) is None
    if data:
        assert read(stream, len(data) - 1) is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bit_that_flipped(strategy: int) -> None:
    """It is found, or makes no difference, or the one that zlib does not find either."""
    data = bytes(np.random.default_rng(5).zipf(1.6, 400).clip(0, 200).astype(np.uint8))
    encoder = zlib.compressobj(6, zlib.DEFLATED, 15, 8, strategy)
    stream = encoder.compress(data) + encoder.flush()
    refused = 0
    for bit in range(8 * len(stream)):
        flipped = bytearray(stream)
        flipped[bit // 8] ^= 1 << bit % 8
        found = read(bytes(flipped), len(data))
        assert found in (None, data) or found == zlib.decompress(bytes(flipped))
        refused += found is None
    assert refused > 7 * len(stream)


@given(st.binary(max_size=200), st.integers(0, 300))
def test_bytes_that_are_no_stream(tail: bytes, size: int) -> None:
    """A header that is right, then anything: bounds hold whatever it says."""
    found = read(b"\x78\x9c" + tail, size)
    assert found is None or found == zlib.decompress(b"\x78\x9c" + tail)
