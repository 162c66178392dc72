from __future__ import annotations

import threading
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ckptdiff.deflate.deflate import Deflated, deflate, deflate_parts


def frozen(data: np.ndarray) -> np.ndarray:
    """The kind of array that the kernels are compiled for already."""
    data = data.view()
    data.setflags(write=False)
    return data


def assert_inverse(data: np.ndarray) -> bytes:
    data = frozen(data)
    stream, _ = deflate(data, 10 * data.size + 1000)
    if stream is None:  # it would be as large as the data
        stream = b"\0" * data.size
    else:
        assert zlib.decompress(stream) == data.tobytes()
    return stream


@given(arrays(np.uint8, st.integers(1, 3000), elements=st.sampled_from([0, 0, 0, 1, 254, 255, 255])))
def test_few_different_bytes(data: np.ndarray) -> None:
    assert_inverse(data)


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(1, 1000)), min_size=1, max_size=40))
def test_runs_of_every_length(runs: list[tuple[int, int]]) -> None:
    assert_inverse(np.concatenate([np.full(length, byte, np.uint8) for byte, length in runs]))


@given(st.integers(0, 2**32), st.floats(0, 1), st.integers(1, 140_000))
def test_random_masks(seed: int, density: float, size: int) -> None:
    bits = np.random.default_rng(seed).random(8 * size) < density
    assert_inverse(np.packbits(bits))


@given(st.binary(min_size=1, max_size=500))
def test_any_bytes(data: bytes) -> None:
    assert_inverse(np.frombuffer(data, np.uint8))


@given(st.lists(st.integers(0, 2**40), min_size=8, max_size=200), st.integers(1, 20))
def test_without_a_search_the_streams_are_the_same(counts: list[int], times: int) -> None:
    """Of counters, each with zeros around it, as histograms are; they come again, which then nobody tells."""
    data = frozen(np.tile(np.array(counts, np.uint64), times).view(np.uint8))
    cut = 8 * times
    parts = np.array([[0, cut, cut + 1000], [cut, data.size, data.size]])
    searched, found = (deflate_parts(data, parts, search=search) for search in (True, False))
    assert found == [Deflated(one.stream, False) for one in searched]
    for (start, stop, _), one in zip(parts.tolist(), found, strict=True):
        assert one.stream is None or zlib.decompress(one.stream) == data[start:stop].tobytes()


@pytest.mark.parametrize("length", [*range(1, 40), *range(255, 270), *range(510, 530), 65536, 131072])
def test_one_run(length: int) -> None:
    for before in (b"", b"\1", b"\1\2\3\4\5\6\7"):
        assert_inverse(np.frombuffer(before + b"\0" * length + b"\7", np.uint8))
        assert_inverse(np.frombuffer(before + b"\xff" * length, np.uint8))


def test_codes_that_huffman_would_make_too_long_are_shortened() -> None:
    # Fibonacci counts make the deepest tree: 24 levels here, where deflate allows 15.
    counts = [1, 1]
    while sum(counts) < 100_000:
        counts.append(counts[-1] + counts[-2])
    data = np.repeat(np.arange(len(counts), dtype=np.uint8), counts)
    np.random.default_rng(0).shuffle(data)
    stream = assert_inverse(data)
    assert len(stream) <= 1.01 * len(zlib.compress(data, 6))


def test_what_does_not_fit_the_limit_is_not_written() -> None:
    data = frozen(np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8))
    assert deflate(data, data.size).stream is None
    stream, _ = deflate(frozen(data // 16), data.size)
    assert stream is not None
    assert deflate(frozen(data // 16), len(stream)).stream is None
    assert deflate(frozen(data // 16), len(stream) + 1).stream == stream


def test_threads_do_not_disturb_each_other() -> None:
    rng = np.random.default_rng(0)
    chunks = [frozen(np.packbits(rng.random(200_000 + 1000 * i) < 0.1)) for i in range(8)]
    alone = [deflate(chunk, chunk.size).stream for chunk in chunks]
    together: list[bytes | None] = [None] * len(chunks)

    def work(i: int) -> None:
        for _ in range(20):
            together[i] = deflate(chunks[i], chunks[i].size).stream

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(chunks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
