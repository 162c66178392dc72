"""Folders of torch.distributed.checkpoint are read where they lie, one slice of a rank after the other."""

import os
import pickle
import shutil

import pytest
import torch
from fake_ranks import part_of, save_as_dcp
from stored_values import assert_holds, assert_parts
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, save
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.tensor import Replicate, Shard

from ckptdiff.checkpoint import open_checkpoint
from ckptdiff.errors import CheckpointError

WHOLE = torch.arange(60, dtype=torch.float32).reshape(10, 6)
STATE = {
    "model": {
        "w": WHOLE,
        "half": WHOLE.bfloat16(),
        "turned": WHOLE.t(),
        "conv": torch.randn(5, 4, 3, 2).to(memory_format=torch.channels_last),
        "view": WHOLE[2:4, 1:3],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "fp8": torch.ones(7).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
    },
    "optimizer": {"state": {"w": {"exp_avg": WHOLE}}, "param_groups": [{"lr": 0.1}]},
    "step": 3,
}


@pytest.fixture
def folder(tmp_path):
    save(STATE, storage_writer=FileSystemWriter(tmp_path / "dcp"), no_dist=True)
    return tmp_path / "dcp"


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return caught.value


def changed(folder, change):
    """Have `change` make the metadata anew, by torch's own classes."""
    metadata = FileSystemReader(folder).read_metadata()
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


@pytest.mark.parametrize("io", ["pread", "mmap"])
def test_one_rank(folder, tmp_path, io):
    assert_holds(folder, STATE["model"], io)
    (warning,) = open_checkpoint(folder).warnings
    assert "part 'model' is read, and not 'optimizer' (1 tensor)" in warning
    assert_holds(folder / ".metadata", STATE["model"])
    assert_holds(f"{folder}#optimizer", {"state.w.exp_avg": WHOLE})
    dcp_to_torch_save(folder, tmp_path / "whole.pt")
    assert_holds(tmp_path / "whole.pt", torch.load(tmp_path / "whole.pt", weights_only=False)["model"])


@pytest.mark.parametrize(
    ("shape", "placements"),
    [
        ((4,), [Shard(0)]),
        ((4,), [Shard(1)]),
        ((2, 2), [Shard(0), Shard(1)]),
        ((2, 2), [Replicate(), Shard(0)]),
        ((3, 2), [Shard(1), Shard(0)]),
    ],
)
def test_slices_of_several_ranks(tmp_path, shape, placements):
    wholes = {"w": WHOLE, "half": WHOLE.bfloat16(), "short": WHOLE[:3], "experts": torch.randn(5, 3, 2)}

    def make(mesh):
        return {"model": {name: part_of(whole, mesh, placements) for name, whole in wholes.items()}}

    folder = save_as_dcp(tmp_path / "dcp", shape, make)
    assert_holds(folder, wholes)
    every = [(first, first + 7) for first in range(0, 53, 5)]
    assert_parts(folder, "w", wholes, every, [((2, 9), (1, 4)), ((0, 10), (5, 6))])
    (folder / "__1_0.distcp").unlink()
    error = refusal(folder)
    assert error.problem == "the metadata name a file that is missing"
    assert error.expected == f"a file {folder / '__1_0.distcp'}"


def test_a_flat_state_dict(tmp_path):
    state = {"layers.0.weight": WHOLE, "norm": torch.ones(3)}
    optimizer = {"state.layers.0.weight.exp_avg": WHOLE, "param_groups.0.lr": 0.1}
    save({**state, "optimizer": optimizer}, storage_writer=FileSystemWriter(tmp_path / "dcp"), no_dist=True)
    assert_holds(tmp_path / "dcp", state)


def test_the_shards_are_the_files_that_hold_weights(folder):
    checkpoint = open_checkpoint(folder)
    assert [os.path.basename(shard.path) for shard in checkpoint.shards] == ["__0_0.distcp"]  # noqa: PTH119
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in STATE["model"].values())


def test_files_without_metadata(folder):
    (folder / ".metadata").unlink()
    error = refusal(folder)
    assert error.problem.startswith("the folder holds shards of torch.distributed.checkpoint without .metadata")
    assert refusal(folder / "__0_0.distcp").hint == f"name the folder: {folder}"


def test_a_file_cut_short(folder):
    path = folder / "__0_0.distcp"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 4])
    error = refusal(folder)
    assert error.problem == "the file is truncated: a slice lies beyond its end"
    assert error.file == str(path)
    assert error.tensor in STATE["model"]


def test_metadata_cut_short(folder):
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes()[:-20])
    error = refusal(folder)
    assert (error.problem, error.file) == ("the metadata is damaged, or of an unknown kind", str(path))
    path.write_bytes(pickle.dumps({"a": 1}))
    assert refusal(folder).problem == "the metadata are not those of torch.distributed.checkpoint"
    path.write_bytes(b"\x80\x04cposix\nsystem\n(S'touch PWNED'\ntR.")
    error = refusal(folder)
    assert error.found == "posix.system"


def move(metadata, name, **fields):
    for index, info in metadata.storage_data.items():
        if index.fqn == name:
            for field, value in fields.items():
                setattr(info, field, value(getattr(info, field)) if callable(value) else value)


@pytest.mark.parametrize("outside", ["../x.distcp", "/etc/passwd", "a/../../x", ""])
def test_a_file_outside_the_folder(folder, outside):
    error = refusal(changed(folder, lambda metadata: move(metadata, "model.w", relative_path=outside)))
    assert error.problem == "the metadata name a file outside their folder"


def test_slices_that_share_their_place(folder):
    error = refusal(changed(folder, lambda metadata: move(metadata, "model.half", offset=lambda offset: offset - 100)))
    assert error.problem in ("two slices share their place in a file", "the file is truncated, or no zip archive")
    assert error.tensor is not None


def test_compressed_slices(folder):
    error = refusal(changed(folder, lambda metadata: move(metadata, "model.w", transform_descriptors=["zstd"])))
    assert (error.tensor, error.found) == ("w", "transform_descriptors")


def test_slices_that_leave_gaps_or_overlap(tmp_path):
    def make(mesh):
        return {"model": {"w": part_of(WHOLE, mesh, [Shard(0)])}}

    folder = save_as_dcp(tmp_path / "dcp", (2,), make)

    def cut(metadata):
        metadata.state_dict_metadata["model.w"].chunks.pop()

    def lose(metadata):
        del metadata.storage_data[next(index for index in metadata.storage_data if index.offset == torch.Size([5, 0]))]

    def shift(metadata):
        metadata.state_dict_metadata["model.w"].chunks[1].offsets = torch.Size([4, 0])
        index = next(index for index in metadata.storage_data if index.offset == torch.Size([5, 0]))
        metadata.storage_data[type(index)("model.w", [4, 0])] = metadata.storage_data.pop(index)

    def beyond(metadata):
        metadata.state_dict_metadata["model.w"].size = torch.Size([8, 6])

    def other(metadata):
        metadata.state_dict_metadata["model.w"].properties.dtype = torch.int32

    for change, problem in [
        (cut, "slices of the tensor are missing"),
        (lose, "the metadata do not say where a slice of the tensor lies"),
        (shift, "two slices of the tensor overlap"),
        (beyond, "a slice lies beyond the tensor"),
        (other, "the file holds something else than the metadata say"),
    ]:
        copy = shutil.copytree(folder, tmp_path / change.__name__)
        error = refusal(changed(copy, change))
        assert (error.problem, error.tensor) == (problem, "w")


def test_safetensors_beside_it_come_first(folder):
    from safetensors.torch import save_file

    save_file({"a": WHOLE}, folder / "model.safetensors")
    assert_holds(folder, {"a": WHOLE})
