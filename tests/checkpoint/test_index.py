import json
import os

import pytest
from raw_safetensors import write, write_index

from ckptdiff.checkpoint import open_checkpoint
from ckptdiff.checkpoint.index import read_index
from ckptdiff.errors import CheckpointError, IndexFileError

A, B, C = {"a": ("F32", (2, 3))}, {"b": ("BF16", (4,))}, {"c": ("U8", (1,))}


@pytest.fixture
def folder(tmp_path):
    """Two shards, inside a folder that has neighbours."""
    path = tmp_path / "model"
    write(path / "one.safetensors", A)
    write(path / "two.safetensors", {**B, **C})
    write(tmp_path / "outside.safetensors", A)
    return path


@pytest.fixture
def refusal(folder):
    """The error of opening the folder with this index: text, bytes or an object."""

    def refuse(content):
        path = folder / "model.safetensors.index.json"
        content = json.dumps(content) if not isinstance(content, (str, bytes)) else content
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(IndexFileError) as caught:
            open_checkpoint(folder)
        assert caught.value.file == str(path)
        return caught.value

    return refuse


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "the index is not valid JSON"),
        ("{", "the index is not valid JSON"),
        (b'{"weight_map": {"\xff": "one.safetensors"}}', "the index is not UTF-8"),
        ([], "the index is not a JSON object"),
        ({}, "the index has no weight_map"),
        ({"weight_map": None}, "the index has no weight_map"),
        ({"weight_map": ["a"]}, "the index has no weight_map"),
        ({"weight_map": {}}, "the index names no tensor"),
        ({"weight_map": {"a": 1}}, "weight_map does not give the tensor a file name"),
        ({"weight_map": {"a": ["one.safetensors"]}}, "weight_map does not give the tensor a file name"),
        ('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "the index repeats a key"),
        ('{"weight_map": {"a": "one.safetensors"}, "weight_map": {}}', "the index repeats a key"),
        ('{"weight_map": ' + "[" * 200_000, "the index is nested too deeply"),
    ],
)
def test_damaged_indexes(refusal, content, problem):
    assert refusal(content).problem == problem


@pytest.mark.parametrize(
    "shard",
    ["../outside.safetensors", "sub/../../outside.safetensors", "/etc/passwd", "..", ".", "", "one.safetensors/",
     "./one.safetensors", "sub//one.safetensors", "..\\outside.safetensors", "a\0b"],
)  # fmt: skip
def test_a_shard_outside_the_folder(refusal, shard):
    error = refusal({"weight_map": {"a": shard}})
    assert error.problem == "the index names a shard outside its folder"
    assert (error.tensor, error.found) == ("a", shard)


def test_an_absolute_path_to_a_shard_that_exists(refusal, folder):
    error = refusal({"weight_map": {"a": str(folder / "one.safetensors")}})
    assert error.problem == "the index names a shard outside its folder"


def test_a_linked_folder_that_leads_outside(refusal, folder):
    (folder / "sub").symlink_to("..")
    error = refusal({"weight_map": {"a": "sub/outside.safetensors"}})
    assert error.problem == "the index names a shard outside its folder"


def test_a_shard_that_is_a_link_and_one_in_a_folder_inside(folder):
    (folder / "linked.safetensors").symlink_to("../outside.safetensors")
    write(folder / "sub" / "three.safetensors", {"d": ("U8", (1,))})
    index = write_index(folder / "my.safetensors.index.json", {"a": "linked.safetensors", "d": "sub/three.safetensors"})
    assert list(open_checkpoint(index).tensors) == ["a", "d"]


def test_a_folder_reached_by_a_link(folder):
    write_index(folder / "model.safetensors.index.json", {"a": "one.safetensors"})
    (folder.parent / "link").symlink_to("model")
    assert list(open_checkpoint(folder.parent / "link").tensors) == ["a"]


@pytest.mark.parametrize("shard", ["none.safetensors", "sub/none.safetensors", "n" * 3000, "one.safetensors/x"])
def test_a_missing_shard(refusal, folder, shard):
    error = refusal({"weight_map": {"c": "two.safetensors", "a": shard}})
    assert error.problem == "the index names a shard that is missing or cannot be reached"
    assert error.tensor == "a"
    assert error.expected == f"a file {folder / shard}"
    assert error.hint is not None


def test_a_link_to_a_blob_that_is_missing(refusal, folder):
    (folder / "linked.safetensors").symlink_to("blob")
    assert "blob" in refusal({"weight_map": {"a": "linked.safetensors"}}).found


def test_a_shard_that_is_a_fifo(folder):
    os.mkfifo(folder / "fifo.safetensors")
    index = write_index(folder / "my.safetensors.index.json", {"a": "fifo.safetensors"})
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(index)


def test_a_pickle_that_is_missing(refusal):
    error = refusal({"weight_map": {"a": "pytorch_model.bin"}})
    assert error.problem == "the index names a shard that is missing or cannot be reached"


@pytest.mark.parametrize(
    ("tensor", "shard", "found"),
    [("b", "one.safetensors", "two.safetensors"), ("missing", "one.safetensors", "it is in no shard")],
)
def test_a_tensor_that_its_shard_lacks(refusal, tensor, shard, found):
    error = refusal({"weight_map": {"a": "one.safetensors", "c": "two.safetensors", tensor: shard}})
    assert error.problem == "the index names a shard that lacks the tensor"
    assert error.tensor == tensor
    assert shard in error.expected
    assert found in error.found


def test_an_index_over_the_limit(folder):
    path = folder / "model.safetensors.index.json"
    write_index(path, {"a": "one.safetensors"})
    size = path.stat().st_size
    assert read_index(str(path), limit=size).weight_map == {"a": "one.safetensors"}
    with pytest.raises(IndexFileError) as caught:
        read_index(str(path), limit=size - 1)
    assert caught.value.file == str(path)
    assert caught.value.problem == "the file is too long"
    assert caught.value.expected == f"at most {size - 1} bytes"


def test_an_index_that_nobody_may_read(public_dir, error_of_nobody):
    write(public_dir / "one.safetensors", A)
    index = public_dir / "model.safetensors.index.json"
    write_index(index, {"a": "one.safetensors"})
    assert error_of_nobody(lambda: open_checkpoint(public_dir)) == ""
    index.chmod(0)
    assert "no permission to read" in error_of_nobody(lambda: open_checkpoint(public_dir))


class TestWarnings:
    def warnings(self, folder, weight_map, **metadata):
        write_index(folder / "model.safetensors.index.json", weight_map, **metadata)
        checkpoint = open_checkpoint(folder)
        return list(checkpoint.tensors), "\n".join(checkpoint.warnings)

    def test_tensors_that_the_index_leaves_out_are_kept(self, folder):
        tensors, warnings = self.warnings(folder, {"a": "one.safetensors", "c": "two.safetensors"})
        assert tensors == ["a", "b", "c"]
        assert "leaves out 1 tensor that its shards hold: b" in warnings

    def test_shards_that_the_index_leaves_out_are_not_read(self, folder):
        (folder / "two.safetensors").write_bytes(b"damaged")
        tensors, warnings = self.warnings(folder, {"a": "one.safetensors"})
        assert tensors == ["a"]
        assert "two.safetensors: not read" in warnings

    @pytest.mark.parametrize("total", [24 + 8 + 1, 24.0 + 8 + 1, "33", None])
    def test_a_total_size_that_is_right_or_says_nothing(self, folder, total):
        weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
        assert self.warnings(folder, weight_map, total_size=total) == (["a", "b", "c"], "")

    def test_a_total_size_that_is_wrong(self, folder):
        weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
        _, warnings = self.warnings(folder, weight_map, total_size=34)
        assert "total_size 34, its shards hold 33 bytes" in warnings
