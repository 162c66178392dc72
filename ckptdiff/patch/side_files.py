"""Say which files a checkpoint has, and where in them its tensors lie."""

from __future__ import annotations

from pathlib import Path

from ckptdiff.checkpoint import Checkpoint, TensorInfo
from ckptdiff.errors import CheckpointError

__all__ = ["SideFiles"]


class SideFiles:
    """The files of a checkpoint, and its tensors in the order of their bytes.

    Raises
    ------
    CheckpointError
        The index gives one file two names.
    """

    def __init__(self, checkpoint: Checkpoint, path: Path) -> None:
        self.single = checkpoint.index is None and not path.is_dir()
        self.folder = Path(checkpoint.index.path if checkpoint.index else checkpoint.shards[0].path).parent
        if checkpoint.index is not None and len(checkpoint.index.shard_paths) != len(checkpoint.shards):
            raise CheckpointError(
                "the index gives one file two names",
                file=checkpoint.index.path,
                expected=f"{len(checkpoint.index.shard_paths)} files",
                found=f"{len(checkpoint.shards)}",
            )
        self.index = checkpoint.index
        of_shard: dict[str, list[TensorInfo]] = {shard.path: [] for shard in checkpoint.shards}
        for tensor in checkpoint.tensors.values():
            of_shard[tensor.shard.path].append(tensor)
        self.shards = checkpoint.shards
        self.tensors: list[tuple[int, TensorInfo]] = []
        self.header_sizes = []
        for file, shard in enumerate(self.shards):
            held = sorted(of_shard[shard.path], key=lambda tensor: (tensor.start, tensor.stop, tensor.name))
            self.tensors += [(file, tensor) for tensor in held]
            self.header_sizes.append(held[0].start if held else shard.size)

    def name(self, path: str) -> str:
        """A file's name in the checkpoint's folder."""
        return Path(path).relative_to(self.folder).as_posix()
