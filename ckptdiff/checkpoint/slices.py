"""Recognise shards of several ranks that hold slices of tensors, as torch.distributed.checkpoint writes them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path

from ckptdiff.checkpoint.header import Shard
from ckptdiff.errors import CheckpointError

__all__ = ["holds_slices", "sliced", "written_by_ranks"]

_KEY = "DCP_SHARDING_INFO"
_CONSOLIDATE = (
    "import glob, os; from safetensors import safe_open; "
    "from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files; "
    'names = {{n for f in glob.glob({folder} + "/*.safetensors") for n in safe_open(f, "pt").keys()}}; '
    "os.makedirs({whole}); consolidate_safetensors_files({folder}, {whole}, dict.fromkeys(sorted(names), 1))"
)


def written_by_ranks(shards: Iterable[Shard]) -> bool:
    """Whether all of some files were written by HuggingFaceStorageWriter, each by one rank."""
    return all(_KEY in shard.metadata for shard in shards)


def holds_slices(shard: Shard) -> bool:
    """Whether a file holds a slice that is not the first of its tensor, by what its metadata says."""
    try:
        saved = json.loads(shard.metadata.get(_KEY, "{}"))
        return any(any(one["saved_offsets"]) for one in saved.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False  # not what torch writes


def sliced(shard: Shard, tensor: str) -> CheckpointError:
    """Make the error about a checkpoint of slices, with the command that puts them together."""
    folder = Path(shard.path).parent
    places = {"folder": json.dumps(str(folder)), "whole": json.dumps(str(folder / "consolidated"))}
    return CheckpointError(
        "the file holds slices of tensors, one of the files that several ranks wrote",
        file=shard.path,
        tensor=tensor,
        expected="whole tensors",
        found=f"{_KEY} in its metadata, as torch.distributed.checkpoint writes it",
        hint="put them together, and name the new folder: python -c " + shlex.quote(_CONSOLIDATE.format(**places)),
    )
