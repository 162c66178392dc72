"""What is said of coordinates that compiled code could not read."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ckptdiff.checkpoint import open_checkpoint, pair
from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.errors import ChangedFileError, CheckpointError
from ckptdiff.run.shard_source import ShardSource, SideRooms
from ckptdiff.run.tasks import Span

NUMEL = 1000


@pytest.mark.parametrize("io", ["pread", "mmap"])
@pytest.mark.parametrize("same", [True, False])
def test_a_read_that_failed_once_names_the_tensor_and_the_files(io: str, same: bool, tmp_path: Path) -> None:
    paths = [tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"]
    for number, path in enumerate(paths):
        save_file({"w": np.full(NUMEL, number, np.float32)}, path)
    (matched,) = pair(open_checkpoint(paths[0]), open_checkpoint(paths[0 if same else 1])).pairs
    with open_shards(io) as shards:
        source = ShardSource(shards, matched, Span(0, 0, 1), SideRooms(), threading.Event())
        with pytest.raises(CheckpointError, match="could not be read, and then it could") as caught:
            source.fail(0, NUMEL)
    assert caught.value.file == (str(paths[0]) if same else f"{paths[0]} or {paths[1]}")
    assert caught.value.tensor == "w" and caught.value.hint


def test_a_failure_that_lasts_is_named_as_what_it_is(tmp_path: Path) -> None:
    paths = [tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"]
    for path in paths:
        save_file({"w": np.zeros(NUMEL, np.float32)}, path)
    (matched,) = pair(*map(open_checkpoint, paths)).pairs
    with paths[1].open("r+b") as file:
        file.truncate(200)
    with pytest.raises(ChangedFileError) as caught, open_shards("pread") as shards:
        ShardSource(shards, matched, Span(0, 0, 1), SideRooms(), threading.Event()).fail(0, NUMEL)
    assert caught.value.file == str(paths[1])
