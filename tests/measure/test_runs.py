"""A side in pieces, in files and in memory, is read as the same side in one piece."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptdiff.codes.fetch import FETCH, MEMORY, Side, fetch
from ckptdiff.formats import FORMATS
from ckptdiff.jit import kernel
from ckptdiff.measure.bitwise import scan_bits
from ckptdiff.measure.cpu import CpuBackend
from ckptdiff.measure.partial import BLOCK, BitScan, Partial, Rule, Scan
from ckptdiff.measure.reference import ReferenceBackend
from ckptdiff.measure.source import InMemory, Runs, Window, blocks_of_span, read_runs

NUMEL = FETCH + 70_001
DATA = np.random.default_rng(0).integers(0, 256, 8 * NUMEL + 8, np.uint8)


@kernel
def fetch_sum(side: Side, first: int, stop: int) -> tuple[int, int]:
    got = fetch(side, first, stop)
    total = 0
    for i in range(got.size):
        total += np.int64(got[i]) * (i % 251 + 1)
    return total, got.size


def expected_sum(raw: np.ndarray) -> int:
    return int((raw.astype(np.int64) * (np.arange(raw.size) % 251 + 1)).sum())


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    path = tmp_path_factory.mktemp("runs") / "data"
    path.write_bytes(DATA.tobytes())
    with path.open("rb") as opened:
        yield opened.fileno()


def runs_of(starts: list[int], kinds: list[bool], item: int, file: int, shift: int) -> Runs:
    """Runs of DATA from byte `shift` on, each in the file or in memory."""
    rows = []
    for start, in_file in zip(starts, kinds, strict=False):
        at = shift + start * item
        rows.append((start, file, at) if in_file else (start, MEMORY, DATA.ctypes.data + at))
    return np.array(rows, np.int64)


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(1, NUMEL - 1), max_size=6, unique=True),
    kinds=st.lists(st.booleans(), min_size=7, max_size=7),
    item=st.sampled_from([1, 2, 4, 8]),
    shift=st.integers(0, 8),
    first=st.sampled_from([0, FETCH]),
)
def test_pieces_are_fetched_in_order(
    file: int, cuts: list[int], kinds: list[bool], item: int, shift: int, first: int
) -> None:
    runs = runs_of([0, *sorted(cuts)], kinds, item, file, shift)
    stop = min(first + FETCH, NUMEL)
    right = DATA[shift + first * item : shift + stop * item]
    room = np.zeros(8 * FETCH, np.uint8)
    room.flags.writeable = False
    assert fetch_sum(Side(runs, room, item), first, stop) == (expected_sum(right), right.size)
    got = np.zeros(right.size, np.uint8)
    assert read_runs(runs[runs[:, 0] < stop], first, 8 * item, got)
    np.testing.assert_array_equal(got, right)


def test_what_a_file_lacks_comes_short(file: int) -> None:
    beyond = DATA.size // 2 - 100
    runs = np.array([[0, file, 0], [50, file, 2 * beyond]])
    room = np.zeros(8 * FETCH, np.uint8)
    room.flags.writeable = False
    assert fetch_sum(Side(runs, room, 2), 0, 1000)[1] == 2 * 150
    assert not read_runs(runs, 0, 16, np.zeros(2000, np.uint8))
    assert not read_runs(np.array([[0, 10**6, 0]]), 0, 16, np.zeros(2000, np.uint8))


class Pieces(InMemory):
    """A source whose tuned side lies in many pieces."""

    def windows(self) -> Iterator[Window]:
        (whole,) = super().windows()
        tuned = self._sides[1]
        item = tuned.size // self.numel
        starts = [0, 3, BLOCK - 1, BLOCK, BLOCK + FETCH + 5]
        self.kept = [tuned[start * item :].copy() for start in starts]
        runs = np.array([(start, MEMORY, held.ctypes.data) for start, held in zip(starts, self.kept, strict=True)])
        yield Window(whole.first, whole.stop, whole.base, runs)


@pytest.mark.parametrize("backend", [CpuBackend, ReferenceBackend])
def test_pieces_give_the_same_partial_and_mask(backend: type) -> None:
    rng = np.random.default_rng(1)
    n = BLOCK + 2 * FETCH + 17
    base = rng.integers(0, 1 << 16, n, np.uint16)
    tuned = np.where(rng.random(n) < 0.1, base ^ 1, base).astype(np.uint16)
    scan = Scan(*[FORMATS["bf16"]] * 3, (0.0, 1e-5), 1e-3, Rule.BITWISE, want_mask=True)
    found = []
    for kind in (InMemory, Pieces):
        partial = Partial()
        mask = backend().scan(scan, kind(base.view(np.uint8), tuned.view(np.uint8), n), partial)
        found.append((partial, mask.copy()))
    (whole, mask), (pieces, other) = found
    np.testing.assert_array_equal(mask, other)
    np.testing.assert_array_equal(np.unpackbits(mask, bitorder="little")[:n], base != tuned)
    for name in ("counts", "sums", "weights", "deltas", "ulp"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(pieces, name), err_msg=name)


def test_packed_elements_in_blocks() -> None:
    """Four bits an element: a block is half as many bytes."""
    raw = np.random.default_rng(2).integers(0, 256, (BLOCK + 10) // 2, np.uint8)
    other = raw.copy()
    other[-1] ^= 0x10
    sizes = [base.size for base, _ in blocks_of_span(InMemory(raw, other, BLOCK + 10), (4, 4))]
    assert sizes == [BLOCK // 2, 5]
    partial = Partial()
    mask = scan_bits(BitScan(4, want_mask=True), InMemory(raw, other, BLOCK + 10), partial)
    assert np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist() == [BLOCK + 9]
