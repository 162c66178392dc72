import os
import subprocess
import sys

import numpy as np
import pytest
from raw_safetensors import SIZES, raw, write, write_index
from safetensors.numpy import load_file, save_file

from ckptdiff.checkpoint import Checkpoint, open_checkpoint, open_pair
from ckptdiff.errors import CheckpointError, HeaderError

A, B, C = {"a": ("F32", (2, 3))}, {"b": ("BF16", (4,))}, {"c": ("I64", ())}


def names(checkpoint):
    return list(checkpoint.tensors)


def test_a_single_file(tmp_path):
    path = write(tmp_path / "any name", {**B, **A})
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.path == path
    assert names(checkpoint) == ["b", "a"]
    assert [shard.path for shard in checkpoint.shards] == [path]
    assert (checkpoint.numel, checkpoint.nbytes) == (4 + 6, 4 * SIZES["BF16"] + 6 * SIZES["F32"])
    assert checkpoint.warnings == ()


def test_a_path_object_and_a_symbolic_link(tmp_path):
    write(tmp_path / "blob", A)
    (tmp_path / "link.safetensors").symlink_to("blob")
    assert names(open_checkpoint(tmp_path / "link.safetensors")) == ["a"]


def test_shards_are_read_in_the_order_of_their_names_and_tensors_in_that_of_their_bytes(tmp_path):
    write(tmp_path / "model-00002-of-00002.safetensors", {"d": ("U8", (1,)), "a": ("U8", (1,))})
    write(tmp_path / "model-00001-of-00002.safetensors", {"z": ("U8", (1,)), "b": ("U8", (1,))})
    checkpoint = open_checkpoint(tmp_path)
    assert names(checkpoint) == ["z", "b", "d", "a"]
    assert [shard.path for shard in checkpoint.shards] == [
        str(tmp_path / f"model-0000{number}-of-00002.safetensors") for number in (1, 2)
    ]
    assert checkpoint.warnings == ()


def test_bytes_of_every_shard_are_those_the_safetensors_library_loads(tmp_path):
    random = np.random.default_rng(1)
    arrays = {f"layers.{n}.weight": random.standard_normal((n, 3)).astype(np.float32) for n in range(6)}
    shards = {f"model-0000{n + 1}-of-00002.safetensors": list(arrays)[n::2] for n in range(2)}
    for shard, held in shards.items():
        save_file({name: arrays[name] for name in held}, tmp_path / shard)
    write_index(
        tmp_path / "model.safetensors.index.json",
        {name: shard for shard, held in shards.items() for name in held},
        total_size=sum(array.nbytes for array in arrays.values()),
    )
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.warnings == ()
    loaded = {name: array for shard in shards for name, array in load_file(tmp_path / shard).items()}
    assert loaded.keys() == checkpoint.tensors.keys()
    for name, tensor in checkpoint.tensors.items():
        with open(tensor.shard.path, "rb") as file:  # noqa: PTH123
            file.seek(tensor.start)
            assert file.read(tensor.nbytes) == loaded[name].tobytes()


def test_the_same_tensor_in_two_shards_names_both(tmp_path):
    first = write(tmp_path / "consolidated.safetensors", {**A, **B})
    second = write(tmp_path / "model.safetensors", {**C, **B})
    with pytest.raises(CheckpointError, match="two files of the checkpoint store the same tensor") as caught:
        open_checkpoint(tmp_path)
    assert (caught.value.file, caught.value.tensor) == (second, "b")
    assert first in caught.value.found
    assert "instead of their folder" in caught.value.hint


def test_two_names_of_one_file_are_read_once(tmp_path):
    first = write(tmp_path / "a.safetensors", A)
    (tmp_path / "b.safetensors").symlink_to("a.safetensors")
    os.link(tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert names(checkpoint) == ["a"]
    assert [shard.path for shard in checkpoint.shards] == [first]
    assert sum("the same file" in warning for warning in checkpoint.warnings) == 2


def test_a_damaged_shard_among_good_ones_is_named(tmp_path):
    write(tmp_path / "model-00001-of-00002.safetensors", A)
    bad = tmp_path / "model-00002-of-00002.safetensors"
    write(bad, B)
    bad.write_bytes(bad.read_bytes()[:-1])
    with pytest.raises(HeaderError, match="truncated") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.file == str(bad)
    assert caught.value.tensor == "b"


def test_a_fifo_among_the_shards_does_not_block(tmp_path):
    write(tmp_path / "a.safetensors", A)
    os.mkfifo(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(tmp_path)


def test_a_checkpoint_without_tensors(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(raw({}))
    checkpoint = open_checkpoint(tmp_path)
    assert (names(checkpoint), checkpoint.numel, checkpoint.nbytes) == ([], 0, 0)


def test_importing_loads_only_the_standard_library():
    code = (
        "import sys; import ckptdiff.checkpoint;"
        "print(*(m for m in ('numpy', 'numba', 'h5py', 'torch', 'rich', 'safetensors', 'click') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_pair_of_one_header_is_read_as_each_side_alone(tmp_path):
    """Names, places and metadata of a side whose headers the other one has too, in part or all of them."""
    for side in ("base", "tuned"):
        write(tmp_path / side / "a.safetensors", {"x": ("BF16", (2, 3)), "e": ("F32", (0, 4))}, {"format": "pt"})
        write(tmp_path / side / "b.safetensors", {"y": ("F32", (5,))})
        write(tmp_path / side / "c.safetensors", {"z": ("BF16", (2, 3) if side == "base" else (3, 2))})
    sides = [str(tmp_path / side) for side in ("base", "tuned")]
    assert open_pair(*sides) == (open_checkpoint(sides[0]), open_checkpoint(sides[1]))
    with pytest.raises(CheckpointError, match="store the same tensor"):
        write(tmp_path / "tuned" / "d.safetensors", {"y": ("F32", (5,))})
        open_pair(*sides)


def test_sizes_are_those_of_all_tensors(tmp_path):
    shapes = {f"w{i}": (("F32", "BF16", "U8")[i % 3], ((), (2, 3), (0, 5), (7,))[i % 4]) for i in range(40)}
    checkpoint = open_checkpoint(write(tmp_path / "a.safetensors", shapes))
    tensors = checkpoint.tensors.values()
    assert checkpoint.numel == sum(tensor.numel for tensor in tensors)
    assert checkpoint.nbytes == sum(tensor.stop - tensor.start for tensor in tensors)
