"""Checkpoints of torch.distributed.checkpoint: slices are refused with a command that makes them whole."""

import json
import shlex
import subprocess
import sys

import pytest
import torch
from raw_safetensors import raw, write
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

from ckptdiff.checkpoint import open_checkpoint
from ckptdiff.errors import CheckpointError, HeaderError

WHOLE = {"model.embed.weight": torch.arange(32.0).reshape(8, 4), "model.norm.weight": torch.arange(4.0)}


def save_slices(folder, ranks=2, files=1):
    """What HuggingFaceStorageWriter(save_distributed=True) leaves of ranks that share the rows of a matrix."""
    folder.mkdir()
    for rank in range(ranks):
        rows = 8 // ranks
        state = {"model.embed.weight": WHOLE["model.embed.weight"][rank * rows : (rank + 1) * rows].clone()}
        info = {"model.embed.weight": {"saved_offsets": [rank * rows, 0]}}
        if rank == 0:
            state["model.norm.weight"], info["model.norm.weight"] = WHOLE["model.norm.weight"], {"saved_offsets": [0]}
        metadata = {"DCP_SHARDING_INFO": json.dumps(info), "DCP_VERSION": "1.0", "format": "pt"}
        save_file(state, folder / f"shard-{rank + 1:05d}-model-00001-of-{files:05d}.safetensors", metadata)
    return folder


def test_what_torch_writes_is_what_is_looked_for(tmp_path):
    """One rank writes whole tensors, which are read; its metadata has the form of the slices above."""
    writer = HuggingFaceStorageWriter(str(tmp_path / "one"), save_distributed=True, enable_consolidation=False)
    save(WHOLE, storage_writer=writer, no_dist=True)
    checkpoint = open_checkpoint(tmp_path / "one")
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in WHOLE.items()
    }
    (shard,) = checkpoint.shards
    assert json.loads(shard.metadata["DCP_SHARDING_INFO"])["model.embed.weight"] == {"saved_offsets": [0, 0]}
    assert shard.path.endswith("shard-00001-model-00001-of-00001.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["slices", "it's a 'folder'"])
def test_the_command_puts_slices_together(tmp_path, folder):
    slices = save_slices(tmp_path / folder)
    with pytest.raises(CheckpointError, match="slices of tensors") as caught:
        open_checkpoint(slices)
    command = shlex.split(caught.value.hint.partition(": ")[2])
    assert command[:2] == ["python", "-c"]
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True, cwd=tmp_path)
    assert len(open_checkpoint(slices / "consolidated").tensors) == len(WHOLE)
    (whole,) = (slices / "consolidated").glob("*.safetensors")
    for name, tensor in load_file(whole).items():
        assert torch.equal(tensor, WHOLE[name])


@pytest.mark.parametrize("rank", [1, 2])
def test_one_file_of_slices(tmp_path, rank):
    """The first rank's slices begin where whole tensors would, and only the others' tell."""
    path = save_slices(tmp_path / "slices") / f"shard-{rank:05d}-model-00001-of-00001.safetensors"
    if rank == 1:
        assert open_checkpoint(path).tensors["model.embed.weight"].shape == (4, 4)
    else:
        with pytest.raises(CheckpointError, match="slices of tensors"):
            open_checkpoint(path)


def test_a_rank_that_has_nothing_of_a_file_is_no_missing_shard(tmp_path):
    with pytest.raises(CheckpointError, match="slices of tensors"):
        open_checkpoint(save_slices(tmp_path / "slices", files=3))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": {"saved_offsets": 3}}', "[" * 100_000])
def test_metadata_that_torch_does_not_write_says_nothing(tmp_path, text):
    path = write(tmp_path / "a.safetensors", {"a": ("F32", (2,))}, {"DCP_SHARDING_INFO": text})
    assert list(open_checkpoint(path).tensors) == ["a"]


def test_an_entry_for_a_tied_head(tmp_path):
    """Consolidation writes an empty entry for a name that is in the mapping and in no file."""
    slices = save_slices(tmp_path / "slices")
    names = dict.fromkeys([*WHOLE, "lm_head.weight"], 1)
    (tmp_path / "whole").mkdir()
    consolidate_safetensors_files(str(slices), str(tmp_path / "whole"), names)
    with pytest.raises(HeaderError, match="written for a tied head") as caught:
        open_checkpoint(tmp_path / "whole")
    assert caught.value.tensor == "lm_head.weight"
    entry = {"dtype": "", "shape": [], "data_offsets": [0, 0]}
    (tmp_path / "raw.safetensors").write_bytes(raw({"lm_head.weight": entry}))
    with pytest.raises(HeaderError, match="written for a tied head"):
        open_checkpoint(tmp_path / "raw.safetensors")
