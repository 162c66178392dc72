"""Open the checkpoints that a run compared again."""

from __future__ import annotations

import os
from typing import Any

from ckptdiff.checkpoint import Checkpoint, open_checkpoint
from ckptdiff.errors import CheckpointError
from ckptdiff.runfile.reader import RunFile

__all__ = ["open_side", "shards_json"]


def open_side(run: RunFile, side: str, path: str | os.PathLike[str] | None = None) -> Checkpoint:
    """Open the base or the tuned checkpoint of a run.

    Parameters
    ----------
    run : RunFile
    side : {"base", "tuned"}
    path : path-like, optional
        Where it is now; by default where the run found it.

    Raises
    ------
    CheckpointError
        It cannot be read, or is not what the run compared: another number of shards, or one of another size or header.
        At its old place a shard must not have been modified either.
    """
    known: dict[str, Any] = run.provenance[side]
    try:
        checkpoint = open_checkpoint(path or known["path"])
    except CheckpointError as error:
        error.hint = error.hint or f"name the place of the {side} checkpoint with --{side}"
        raise
    fields = ("header_sha256", "size") if path else ("header_sha256", "size", "mtime_ns")
    expected = sorted(tuple(shard[field] for field in fields) for shard in known["shards"])
    found = sorted(tuple(getattr(shard, field) for field in fields) for shard in checkpoint.shards)
    if expected != found:
        raise CheckpointError(
            f"not the {side} checkpoint that the run compared",
            file=checkpoint.path,
            expected=f"{len(expected)} shards of {known['path']}, as they were then",
            found=f"{len(found)} shards, of which {len(set(expected) & set(found))} are as they were",
            hint="run ckptdiff diff again",
        )
    return checkpoint


def shards_json(run: RunFile, side: str) -> list[dict[str, Any]]:
    """Name, size and header hash of each shard of a side, for the metadata of an export."""
    return [
        {"file": os.path.basename(shard["file"]), "size": shard["size"], "header_sha256": shard["header_sha256"]}  # noqa: PTH119
        for shard in run.provenance[side]["shards"]
    ]
