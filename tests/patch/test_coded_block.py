"""Blocks of a delta: every change comes back, in few bytes, and no other bytes pass for a block."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptdiff.checkpoint import DTYPES
from ckptdiff.patch.coded_block import Coding, DamagedBlockError, Steps, apply_block, code_block, code_steps, read_block

CODINGS = [Coding(1, False), Coding(1, True), Coding(2, True), Coding(4, True), Coding(4, False), Coding(8, True)]


def codes(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    return np.frombuffer(rng.bytes(count * width), f"<u{width}").copy()


def changed(rng: np.random.Generator, base: np.ndarray, share: float, steps: str) -> np.ndarray:
    """Another array of codes, of which about this share differs by small, large, mixed or any steps."""
    moved = rng.random(base.size) < share
    small = rng.integers(1, 4, base.size) * rng.choice([-1, 1], base.size)
    if steps == "mixed":
        small = np.where(rng.random(base.size) < 0.02, rng.integers(-(1 << 31), 1 << 31, base.size), small)
    to = codes(rng, base.size, base.itemsize) if steps == "any" else base + small.astype(np.int64).astype(base.dtype)
    return np.where(moved, to, base)


def back(base: np.ndarray, coded: bytes, coding: Coding) -> np.ndarray:
    made = base.copy()
    apply_block(made.view(np.uint8), read_block(coded, base.size, coding), coding)
    return made


@given(
    coding=st.sampled_from(CODINGS),
    count=st.sampled_from([1, 2, 7, 8, 9, 100, 5000]),
    share=st.sampled_from([0.0, 0.0005, 0.01, 0.1, 0.34, 0.36, 0.9, 1.0]),
    steps=st.sampled_from(["small", "mixed", "any"]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_what_changed_comes_back(coding: Coding, count: int, share: float, steps: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = codes(rng, count, coding.width)
    tuned = changed(rng, base, share, steps)
    coded, found = code_block(base.view(np.uint8), tuned.view(np.uint8), coding)
    assert found == np.count_nonzero(base != tuned)
    assert (coded == b"") == (found == 0)
    assert (back(base, coded, coding) == tuned).all()
    assert len(coded) <= tuned.nbytes + 16


@pytest.mark.parametrize("share", [0.001, 0.015, 0.095, 0.3, 0.6])
def test_the_size_is_near_the_entropy(share: float) -> None:
    """Shannon's bound for positions at random and six steps of one frequency: at most a twentieth above it."""
    rng, count = np.random.default_rng(1), 1 << 18
    base = rng.integers(0x3000, 0x4000, count).astype(np.uint16)
    coded, _ = code_block(base.view(np.uint8), changed(rng, base, share, "small").view(np.uint8), Coding(2, True))
    bits = -share * np.log2(share) - (1 - share) * np.log2(1 - share) + share * np.log2(6)
    assert len(coded) <= 1.05 * count * bits / 8 + 200


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_steps_follow_the_order_of_values(width: int) -> None:
    """From any code to any other; neighbours in value, zeros of either sign among them, are one step apart."""
    sign = 1 << (8 * width - 1)
    rising = [sign + 1, sign, 0, 1]  # -tiny, -0.0, 0.0, tiny
    kind = np.dtype(f"<u{width}")
    base, tuned = np.array(rising[:-1], kind), np.array(rising[1:], kind)
    many = np.repeat(base, 50)
    coded, _ = code_block(many.view(np.uint8), np.repeat(tuned, 50).view(np.uint8), Coding(width, True))
    found = read_block(coded, many.size, Coding(width, True))
    assert isinstance(found, Steps) and (found.z == 0).all()


def test_steps_that_are_known() -> None:
    rng = np.random.default_rng(2)
    base = codes(rng, 3000, 2)
    coded, _ = code_block(base.view(np.uint8), changed(rng, base, 0.1, "mixed").view(np.uint8), Coding(2, True))
    steps = read_block(coded, base.size, Coding(2, True))
    assert isinstance(steps, Steps)
    copied = Steps(steps.positions.copy(), steps.z.copy())
    assert code_steps(copied, base.size, Coding(2, True)) == coded
    assert code_steps(Steps(copied.positions[:0], copied.z[:0]), base.size, Coding(2, True)) == b""


def test_every_dtype_has_a_coding() -> None:
    for dtype in DTYPES.values():
        coding = Coding.of(dtype.name)
        assert coding.width in (1, 2, 4, 8) and (dtype.bits < 8 or dtype.bits % (8 * coding.width) == 0)
        assert coding.floating == (dtype.kind.value == "float" or dtype.name == "C64")


@pytest.mark.parametrize("share", [0.002, 0.1, 0.5])
@pytest.mark.parametrize("steps", ["small", "mixed"])
def test_a_damaged_block_is_refused_or_stays_in_its_bounds(share: float, steps: str) -> None:
    """What a flipped bit leaves is no block, or one of as many codes; a digest finds the rest."""
    rng = np.random.default_rng(3)
    base = codes(rng, 2000, 2)
    coded, _ = code_block(base.view(np.uint8), changed(rng, base, share, steps).view(np.uint8), Coding(2, True))
    refused = 0
    for bit in rng.permutation(8 * len(coded))[:600].tolist():
        flipped = bytearray(coded)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            change = read_block(bytes(flipped), base.size, Coding(2, True))
        except DamagedBlockError:
            refused += 1
            continue
        if isinstance(change, Steps):
            assert change.positions.max() < base.size and (np.diff(change.positions.astype(np.int64)) > 0).all()
    assert refused > 100


@pytest.mark.parametrize("stop", [1, 2, 5, 20, -1])
def test_a_block_that_is_cut_short_or_goes_on(stop: int) -> None:
    rng = np.random.default_rng(4)
    base = codes(rng, 500, 2)
    coded, _ = code_block(base.view(np.uint8), changed(rng, base, 0.1, "small").view(np.uint8), Coding(2, True))
    for damaged in (coded[:stop], coded + b"\0", coded + coded, b"\7" + coded[1:], b"\xff" * 12):
        with pytest.raises(DamagedBlockError):
            read_block(damaged, base.size, Coding(2, True))
    with pytest.raises(DamagedBlockError):
        read_block(coded, base.size // 2, Coding(2, True))
