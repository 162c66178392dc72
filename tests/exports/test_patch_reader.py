"""Patches that are damaged in every way: refused, with what is wrong and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from stored_tensors import Stored, metadata_of, random_tensor, read, write, write_patch

from ckptdiff.errors import CheckpointError, PatchError
from ckptdiff.exports.apply import apply_patch
from ckptdiff.exports.patch_reader import open_patch

Entries = dict[str, Stored]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors = {name: random_tensor(np.random.default_rng(0), "F32", (4, 3)) for name in "ab"}
    return write(tmp_path / "base.safetensors", tensors)


def integers(*values: int, dtype: str = "I32") -> Stored:
    return Stored(dtype, (len(values),), np.array(values, f"<i{int(dtype[1:]) // 8}").tobytes())


def floats(count: int) -> Stored:
    return Stored("F32", (count,), bytes(4 * count))


def test_what_a_patch_says_about_itself(base: Path, tmp_path: Path) -> None:
    indices = np.array([0, 3, 11], np.int32)
    patch = open_patch(write_patch(tmp_path / "p.safetensors", base, {"b": (indices, bytes(12))}))
    assert (patch.rule, patch.compare, list(patch.tensors)) == ("bitwise", "stored", ["b"])
    assert (patch.tensors["b"].shape, patch.tensors["b"].count) == ((4, 3), 3)
    assert patch.base[0][1] == base.stat().st_size


@pytest.mark.parametrize(
    ("entries", "message", "found"),
    [
        ({"a.indices": integers(1)}, "name other tensors", "it is not there"),
        ({"a.values": floats(1)}, "name other tensors", "it is not there"),
        ({}, "name other tensors", "it is not there"),
        ({"a.indices": integers(1), "a.values": floats(1), "b.values": floats(1)}, "name other", "its shape is not"),
        ({"a.indices": integers(1, 2), "a.values": floats(1)}, "not as many values", "I32 [2], values F32 [1]"),
        ({"a.indices": integers(1, dtype="I16"), "a.values": floats(1)}, "not a list of indices", "I16 [1]"),
        (
            {"a.indices": integers(1)._replace(shape=(1, 1)), "a.values": floats(1)._replace(shape=(1, 1))},
            "not a list of indices",
            "I32 [1, 1]",
        ),
        ({"a.indices": integers(*range(13)), "a.values": floats(13)}, "more indices than", "I32 [13]"),
        ({"a.indices": integers(1, 2), "a.values": Stored("F4", (2,), b"1")}, "smaller than a byte", "F4 [2]"),
    ],
)
def test_parts_that_do_not_belong_together(
    entries: Entries, message: str, found: str, base: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "p.safetensors", entries, metadata_of(base, {"a": (4, 3)}))
    with pytest.raises(PatchError, match=message) as caught:
        open_patch(path)
    error = caught.value
    assert error.file == str(path) and error.tensor and error.expected and error.hint
    assert found in error.found


@pytest.mark.parametrize("dtype", ["I32", "I64"])
@pytest.mark.parametrize(
    ("indices", "message", "found"),
    [
        ((0, 12), "outside the tensor", "12 at position 1"),
        ((-1, 2), "outside the tensor", "-1 at position 0"),
        ((3, 3), "do not ascend", "3 at position 1"),
        ((3, 5, 4, 2), "do not ascend", "4 at position 2"),
        ((0, 3, -(2**31)), "outside the tensor", "-2147483648 at position 2"),
        ((0, 2**31 - 1, 1), "outside the tensor", "2147483647 at position 1"),
    ],
)
@pytest.mark.parametrize("block", [1, 2, 1 << 20])
def test_indices_that_cannot_be(
    indices: tuple[int, ...], message: str, found: str, dtype: str, block: int, base: Path, tmp_path: Path
) -> None:
    entries = {"b.indices": integers(*indices, dtype=dtype), "b.values": floats(len(indices))}
    path = write(tmp_path / "p.safetensors", entries, metadata_of(base, {"b": (4, 3)}))
    with pytest.raises(PatchError, match=message) as caught:
        apply_patch(base, path, tmp_path / "out.safetensors", block=block)
    assert (caught.value.file, caught.value.tensor, caught.value.found) == (str(path), "b", found)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base.safetensors", "p.safetensors"]


def test_an_index_for_a_tensor_without_coordinates(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"e": Stored("F32", (0, 3), b"")})
    entries = {"e.indices": integers(0), "e.values": floats(1)}
    path = write(tmp_path / "p.safetensors", entries, metadata_of(base, {"e": (0, 3)}))
    with pytest.raises(PatchError, match="more indices than"):
        apply_patch(base, path, tmp_path / "out.safetensors")


DAMAGE: list[Callable[[dict[str, str]], object]] = [
    lambda metadata: metadata.pop("shapes"),
    lambda metadata: metadata.pop("base"),
    lambda metadata: metadata.pop("rule"),
    lambda metadata: metadata.update(shapes="{"),
    lambda metadata: metadata.update(shapes="[1]"),
    lambda metadata: metadata.update(shapes='{"a": 12}'),
    lambda metadata: metadata.update(shapes='{"a": "43"}'),
    lambda metadata: metadata.update(shapes='{"a": [4.0, 3]}'),
    lambda metadata: metadata.update(shapes='{"a": [-4, -3]}'),
    lambda metadata: metadata.update(shapes=json.dumps({"a": [-(10**4000), 10**4000]})),
    lambda metadata: metadata.update(shapes="[" * 100_000),
    lambda metadata: metadata.update(base="{}["),
    lambda metadata: metadata.update(base='[{"size": 3}]'),
    lambda metadata: metadata.update(base='[{"size": Infinity, "header_sha256": ""}]'),
    lambda metadata: metadata.update(base="3"),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_metadata_that_are_damaged(damage: Callable[[dict[str, str]], object], base: Path, tmp_path: Path) -> None:
    metadata = metadata_of(base, {"a": (4, 3)})
    damage(metadata)
    path = write(tmp_path / "p.safetensors", {"a.indices": integers(1), "a.values": floats(1)}, metadata)
    with pytest.raises(PatchError, match="metadata of the patch are damaged") as caught:
        open_patch(path)
    assert caught.value.file == str(path) and caught.value.hint


def test_files_that_are_no_patch(base: Path, tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="not a patch") as caught:
        open_patch(base)
    assert caught.value.found == "none" and "mask export" in caught.value.hint
    save_file({"a": np.zeros(3)}, tmp_path / "masks.safetensors", {"format": "ckptdiff-masks"})
    with pytest.raises(PatchError, match="not a patch") as caught:
        open_patch(tmp_path / "masks.safetensors")
    assert caught.value.found == "ckptdiff-masks"
    (tmp_path / "text").write_text("indices and values")
    for path in (tmp_path / "text", tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError):
            open_patch(path)


def test_a_patch_that_was_cut_short(base: Path, tmp_path: Path) -> None:
    path = write_patch(tmp_path / "p.safetensors", base, {"a": (np.array([1, 2]), bytes(8))})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        apply_patch(base, path, tmp_path / "out.safetensors")
    assert read(base) and not (tmp_path / "out.safetensors").exists()


def test_shapes_are_compared_with_those_of_the_base(base: Path, tmp_path: Path) -> None:
    metadata = metadata_of(base, {"a": (4, 3)}) | {"shapes": json.dumps({"a": [12]})}
    path = write(tmp_path / "p.safetensors", {"a.indices": integers(1), "a.values": floats(1)}, metadata)
    with pytest.raises(PatchError, match="another shape in the base"):
        apply_patch(base, path, tmp_path / "out.safetensors")
