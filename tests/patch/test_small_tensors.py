"""Many small tensors at once: byte for byte what is coded and made of each by itself."""

from __future__ import annotations

import hashlib
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ckptdiff import patch
from ckptdiff.errors import PatchError
from ckptdiff.patch.coded_block import Coding, apply_block, code_block, read_block
from ckptdiff.patch.small_tensors import apply_small, code_small, rows_of

CODINGS = [Coding(1, False), Coding(1, True), Coding(2, True), Coding(4, True), Coding(4, False), Coding(8, True)]
SIZES = st.sampled_from([0, 1, 2, 3, 7, 8, 9, 100, 5000, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 80000])
TENSOR = st.tuples(
    st.sampled_from(CODINGS), SIZES, st.sampled_from([0.0, 0.001, 0.015, 0.1, 0.34, 0.36, 1.0]), st.integers(0, 2)
)


def sides_of(tensors: list[tuple[Coding, int, float, int]], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tensors of both sides, one behind the other; the steps are small, or any, or the same again and again."""
    rng, parts = np.random.default_rng(seed), ([np.empty(0, np.uint8)], [np.empty(0, np.uint8)])
    for coding, count, share, kind in tensors:
        code = np.dtype(f"<u{coding.width}")
        base = np.frombuffer(rng.bytes(count * coding.width), code)
        other = np.frombuffer(rng.bytes(count * coding.width), code) if kind == 1 else base + code.type(1)
        moved = np.arange(count) % 64 < 64 * share if kind == 2 else rng.random(count) < share
        for side, values in zip(parts, (base, np.where(moved, other, base).astype(code)), strict=True):
            side.append(values.view(np.uint8))
    return np.concatenate(parts[0]), np.concatenate(parts[1])


@given(st.lists(TENSOR, max_size=12), st.integers(0, 999))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_the_same_bytes_as_one_by_one(tensors: list[tuple[Coding, int, float, int]], seed: int) -> None:
    base, tuned = sides_of(tensors, seed)
    starts = [0, *accumulate(count * coding.width for coding, count, *_ in tensors)]
    rows = rows_of((start, count, coding) for start, (coding, count, *_) in zip(starts, tensors, strict=False))
    coded = code_small(base, tuned, rows)
    for place, (coding, *_) in enumerate(tensors):
        one = slice(starts[place], starts[place + 1])
        assert coded[place] == code_block(base[one].copy(), tuned[one].copy(), coding)
    made, sizes = base.copy(), [len(data) for data, _ in coded]
    for place in apply_small(made, rows, b"".join(data for data, _ in coded), sizes):
        coding, count, *_ = tensors[place]
        one = slice(starts[place], starts[place + 1])
        assert (made[one] == base[one]).all()
        new = made[one].copy()
        apply_block(new, read_block(coded[place][0], count, coding), coding)
        made[one] = new
    assert (made == tuned).all()


def test_what_is_damaged_is_left_as_it_was() -> None:
    """Every bit of the middle one of three blocks flipped: made as it says, or left to be read by itself."""
    tensors = [(CODINGS[2], 60, 0.3, 0)] * 3
    base, tuned = sides_of(tensors, 5)
    rows = rows_of((start, 60, CODINGS[2]) for start in (0, 120, 240))
    blocks = [data for data, _ in code_small(base, tuned, rows)]
    left = 0
    for bit in range(8 * len(blocks[1])):
        flipped = bytearray(blocks[1])
        flipped[bit // 8] ^= 1 << bit % 8
        made = base.copy()
        alone = apply_small(made, rows, blocks[0] + bytes(flipped) + blocks[2], [len(one) for one in blocks])
        assert (made[:120] == tuned[:120]).all()
        if 1 in alone:
            assert (made[120:240] == base[120:240]).all()
        assert (2 in alone) or (made[240:] == tuned[240:]).all()
        left += 1 in alone
    assert left > 4 * len(blocks[1])


def test_blocks_are_those_of_the_first_version() -> None:
    """Coded by the release that introduced the format; patches that lie about have to stay what they are."""
    base = (np.arange(300_000, dtype=np.uint32) * 2654435761 >> 13).astype(np.uint16)
    moved = np.arange(base.size) * 40503 % 1021 < 97
    tuned = np.where(moved, base + (np.arange(base.size) % 3 + 1).astype(np.uint16), base)
    large = code_block(base.view(np.uint8), tuned.view(np.uint8), Coding(2, True))[0]
    starts = range(0, base.nbytes, 6000)
    rows = rows_of((start, 3000, Coding(2, True)) for start in starts)
    small = b"".join(data for data, _ in code_small(base.view(np.uint8), tuned.view(np.uint8), rows))
    found = [hashlib.sha256(one).hexdigest()[:16] for one in (large, small)]
    assert found == ["f9b6f7545e35fc2e", "7056dc4279a3cf53"]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Six hundred tensors of several dtypes, some of them the same, one new and one lost; odd ones among even ones."""
    rng, sides = np.random.default_rng(8), ({}, {})
    for place in range(600):
        dtype = [np.float32, np.float16, np.int8, np.int64, np.uint8][place % 5]
        values = rng.integers(-100, 100, (place * 7 % 61, 3)).astype(dtype)
        for side, moved in zip(sides, (False, place % 4 > 0), strict=True):
            side[f"layers.{place}.weight"] = values + values.dtype.type(1) if moved else values
    del sides[0]["layers.7.weight"], sides[1]["layers.400.weight"]
    for name, side in zip(("base", "tuned"), sides, strict=True):
        (tmp_path / name).mkdir()
        save_file(side, tmp_path / name / "model.safetensors")
    return tmp_path / "base", tmp_path / "tuned"


def test_a_checkpoint_of_small_tensors(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    made = patch.make(base, tuned, tmp_path / "step.ckptdelta")
    assert sum(one.state == "whole" for one in made.delta.tensors.values()) == 1
    patch.apply(base, [tmp_path / "step.ckptdelta"], tmp_path / "out")
    found, expected = ((one / "model.safetensors").read_bytes() for one in (tmp_path / "out", tuned))
    assert found == expected


@pytest.fixture
def alike(pair: tuple[Path, Path]) -> tuple[Path, Path]:
    """The same pair without the tensors that one side lacks."""
    for side, name in zip(pair, ("layers.400.weight", "layers.7.weight"), strict=True):
        values = load_file(side / "model.safetensors")
        del values[name]
        save_file(values, side / "model.safetensors")
    return pair


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_a_directory_of_small_tensors(alike: tuple[Path, Path], encoding: str, tmp_path: Path) -> None:
    base, tuned = alike
    made = patch.make_directory(base, tuned, tmp_path / "step", encoding=encoding)
    (file,) = (tmp_path / "step").glob("*.safetensors")
    sides, frames = [load_file(side / "model.safetensors") for side in alike], load_file(file)
    changed = {name for name, one in sides[0].items() if one.tobytes() != sides[1][name].tobytes()}
    assert frames.keys() == changed and made.changed_tensors == len(changed)
    for name in changed if encoding == "xor" else ():
        old, new = (np.frombuffer(side[name].tobytes(), np.uint8) for side in sides)
        assert zstandard.ZstdDecompressor().decompress(frames[name].tobytes()) == (old ^ new).tobytes()
    patch.apply(base, [tmp_path / "step"], tmp_path / "out")
    found, expected = ((one / "model.safetensors").read_bytes() for one in (tmp_path / "out", tuned))
    assert found == expected


def rewritten(file: Path, name: str, frame: bytes) -> None:
    """Put another frame into a directory's file."""
    with safe_open(file, "np") as opened:
        facts, frames = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    save_file(frames | {name: np.frombuffer(frame, np.uint8)}, file, facts)


def test_frames_of_other_writers_among_small_ones(alike: tuple[Path, Path], tmp_path: Path) -> None:
    """One that does not say its size is read as a stream; one that lies, or is cut short, is refused by name."""
    base, tuned = alike
    patch.make_directory(base, tuned, tmp_path / "step")
    (file,) = (tmp_path / "step").glob("*.safetensors")
    name, out = "layers.90.weight", tmp_path / "out"
    frame = load_file(file)[name].tobytes()
    data = zstandard.ZstdDecompressor().decompress(frame)
    rewritten(file, name, zstandard.ZstdCompressor(write_content_size=False).compress(data))
    patch.apply(base, [tmp_path / "step"], out)
    assert (out / "model.safetensors").read_bytes() == (tuned / "model.safetensors").read_bytes()
    for wrong in (frame[:-3], zstandard.ZstdCompressor().compress(data + b"a"), b"no frame"):
        rewritten(file, name, wrong)
        with pytest.raises(PatchError, match="a frame of the patch") as failure:
            patch.apply(base, [tmp_path / "step"], tmp_path / "none")
        assert failure.value.tensor == name and not (tmp_path / "none").exists()


def test_another_base_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    patch.make(base, tuned, tmp_path / "step.ckptdelta")
    values = load_file(base / "model.safetensors")
    values["layers.90.weight"] = values["layers.90.weight"] + 2
    save_file(values, base / "model.safetensors")
    with pytest.raises(PatchError, match="not the one that the patch was made for") as failure:
        patch.apply(base, [tmp_path / "step.ckptdelta"], tmp_path / "out")
    assert failure.value.tensor == "layers.90.weight" and not (tmp_path / "out").exists()
