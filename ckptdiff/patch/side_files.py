"""Say which files a checkpoint has, and where in them its tensors lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ckptdiff.checkpoint import Checkpoint, Shard, TensorInfo
from ckptdiff.checkpoint.regular_file import open_regular, read_bytes
from ckptdiff.errors import ChangedFileError, CheckpointError

__all__ = ["SideFiles"]


class SideFiles:
    """The files of a checkpoint, and its tensors in the order of their bytes.

    Raises
    ------
    CheckpointError
        The index gives one file two names.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.single = checkpoint.index is None and not Path(checkpoint.path).is_dir()
        self.folder = Path(checkpoint.index.path if checkpoint.index else checkpoint.shards[0].path).parent
        if checkpoint.index is not None and len(checkpoint.index.shard_paths) != len(checkpoint.shards):
            raise CheckpointError(
                "the index gives one file two names",
                file=checkpoint.index.path,
                expected=f"{len(checkpoint.index.shard_paths)} files",
                found=f"{len(checkpoint.shards)}",
            )
        self.index = None if checkpoint.index is None else (Path(checkpoint.index.path).name, checkpoint.index.raw)
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

    def require_safetensors(self) -> None:
        """Refuse files that are not a header and tensors, which cannot be made again byte for byte.

        Raises
        ------
        CheckpointError
            It names the first.
        """
        sizes = list(self.header_sizes)
        for file, tensor in self.tensors:
            sizes[file] += tensor.nbytes
        for shard, size in zip(self.shards, sizes, strict=True):
            if size != shard.size:
                raise CheckpointError(
                    "only safetensors files can be made again by a patch, byte for byte",
                    file=shard.path,
                    expected="a header, and tensors without a gap",
                    found=f"{shard.size} bytes, of which its tensors do not lie in one run",
                    hint="save the weights with safetensors",
                )

    def name(self, path: str) -> str:
        """A file's name in the checkpoint's folder."""
        return Path(path).relative_to(self.folder).as_posix()

    def header(self, file: int) -> bytes:
        """The bytes of a file up to the first tensor's.

        Raises
        ------
        CheckpointError
            It cannot be read, or has changed.
        """
        shard, size = self.shards[file], self.header_sizes[file]
        header = _first_bytes(shard, size)
        if hashlib.sha256(header).hexdigest() != shard.header_sha256:
            raise ChangedFileError(
                "the header changed while the checkpoint was read",
                file=shard.path,
                hint="use a copy that nobody writes to",
            )
        return header


def _first_bytes(shard: Shard, size: int) -> bytes:
    if shard.remote is None:
        with open_regular(shard.path) as (descriptor, _):
            return read_bytes(descriptor, size, 0, shard.path)
    from ckptdiff.remote.transport import fetch

    header = bytearray(size)
    fetch(shard.remote.address, 0, memoryview(header), shard.remote.version)
    return bytes(header)
