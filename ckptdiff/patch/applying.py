"""Make a checkpoint of a base and a chain of exact deltas, elsewhere or in place; or verify that it could be made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ckptdiff.checkpoint import Checkpoint, open_checkpoint
from ckptdiff.errors import OptionError, RunFileError
from ckptdiff.events import Listener, stage
from ckptdiff.files.staged import StagedFolder, write_whole
from ckptdiff.patch.chain import Chain
from ckptdiff.patch.digests import required
from ckptdiff.patch.link import Link
from ckptdiff.patch.making import Making
from ckptdiff.patch.opening import open_link
from ckptdiff.patch.spans import load_kernels, threads_for
from ckptdiff.runfile.check_target import check_new

__all__ = ["AppliedDelta", "PathLike", "applied", "apply", "folder_of", "open_chain", "verify", "write_side_index"]

PathLike: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class AppliedDelta:
    """A checkpoint that was made, or could be.

    Attributes
    ----------
    tensors, changed : int
        How many it has, and how many of them a patch changed.
    files : int
    left_out : tuple of str
        What else lies in the base's folder, and was not copied.
    warnings : tuple of str
    """

    tensors: int
    changed: int
    files: int
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def apply(
    base: PathLike,
    patches: Sequence[PathLike],
    target: PathLike,
    *,
    with_files: bool = False,
    threads: int = 0,
    stream: bool = False,
    listener: Listener | None = None,
) -> AppliedDelta:
    """Write the checkpoint that a chain of patches makes of a base, with the files of the last one's tuned side.

    What is read of the base is compared with the digests of the first patch, and what is written with those of the
    last; the target takes its name when all of it is right.

    Parameters
    ----------
    base : path-like
    patches : sequence of path-like
        In the order in which they were made.
    target : path-like
        To be made: a file in ``.safetensors`` if the tuned side was a single file, else a folder.
    with_files : bool
        Whether to link or copy what else lies in the base's folder: configuration, tokenizer.
    threads : int
        0 stands for one per core.
    stream : bool
        Whether a model of the hub is read where it is; else it is downloaded first.
    listener : callable, optional
        Told of the stage "patching", in bytes.

    Returns
    -------
    AppliedDelta

    Raises
    ------
    PatchError
        A patch is none or is damaged, does not follow the one before, or was made for another base.
    CheckpointError
        Base or patch cannot be read, or change while they are read.
    RunFileError
        The target exists or cannot be written.

    Examples
    --------
    >>> base, tuned = "fixtures/llama/base", "fixtures/llama/tuned"
    >>> from ckptdiff import patch
    >>> made = patch.make(base, tuned, "apply.ckptdelta")
    >>> patch.apply(base, ["apply.ckptdelta"], "applied").files
    3
    """
    target = Path(target)
    with open_chain(base, patches, listener, stream) as chain:
        if with_files and _is_elsewhere(chain.base):
            raise OptionError(
                "--with-files links what lies beside the base, and that lies elsewhere",
                file=chain.base.path,
                hint="leave it out, and fetch those files by other means",
            )
        last = chain.links[-1].delta
        if last.single != (target.suffix == ".safetensors"):
            raise OptionError(
                "the result is a single file" if last.single else "the result is a folder of shards",
                file=target,
                expected="a name in .safetensors" if last.single else "the name of a folder",
                found=target.name,
            )
        check_new(target)
        others = () if last.single else _others(chain)
        with stage(listener, "patching", sum(one.size for one in last.files), "bytes") as told:
            making = Making(chain, threads_for(threads), told)
            if last.single:
                making.file(last.files[0], target)
            else:
                with StagedFolder(target) as folder:
                    for one in last.files:
                        making.file(one, _made_folder(folder.path / one.name))
                    write_side_index(chain.links[-1], folder.path)
                    for name in others if with_files else ():
                        _link(folder_of(chain.base) / name, folder.path / name)
                    folder.commit()
        return applied(chain, () if with_files else others)


def verify(
    base: PathLike,
    patches: Sequence[PathLike],
    tuned: PathLike | None = None,
    *,
    threads: int = 0,
    stream: bool = False,
    listener: Listener | None = None,
) -> AppliedDelta:
    """Read all that :func:`apply` would, and check every digest, but write nothing.

    With `tuned`, its bytes are compared with the digests of the result too.

    Parameters
    ----------
    base, patches : as :func:`apply` takes them
    tuned : path-like, optional
    threads : int
        0 stands for one per core.
    stream : bool
        Whether a model of the hub is read where it is; else it is downloaded first.
    listener : callable, optional
        Told of the stage "verifying", in bytes.

    Returns
    -------
    AppliedDelta

    Raises
    ------
    PatchError
        As :func:`apply`; or the result is not the tuned side.

    Examples
    --------
    >>> base, tuned = "fixtures/llama/base", "fixtures/llama/tuned"
    >>> from ckptdiff import patch
    >>> made = patch.make(base, tuned, "verify.ckptdelta")
    >>> patch.verify(base, ["verify.ckptdelta"], tuned).changed
    30
    """
    with open_chain(base, patches, listener, stream) as chain:
        files = chain.links[-1].delta.files
        sides = 1 if tuned is None else 2
        with stage(listener, "verifying", sides * sum(one.size for one in files), "bytes") as told:
            making = Making(chain, threads_for(threads), told)
            for file in range(len(files)):
                making.check(file)
            if tuned is not None:
                making.compare(open_checkpoint(tuned, stream), chain.tensors)
        return applied(chain, ())


@contextmanager
def open_chain(
    base: PathLike, patches: Sequence[PathLike], listener: Listener | None, stream: bool = False
) -> Iterator[Chain]:
    """Open a base and the patches that follow it, and check what needs no values."""
    required("xxhash")
    if not patches:
        raise OptionError("no patch was given", expected="one at least")
    checkpoint = open_checkpoint(base, stream)
    with ExitStack() as stack:
        links: list[tuple[str, Link]] = []
        for path in patches:
            kind, link = open_link(path, checkpoint, links)
            links.append((kind, stack.enter_context(link)))
        chain = Chain(checkpoint, [link for _, link in links])
        load_kernels(listener)
        yield chain


def applied(chain: Chain, left_out: tuple[str, ...]) -> AppliedDelta:
    """What became of a chain."""
    total, changed = len(chain.tensors), len(chain.tensors) - len(chain.unchanged_names())
    warnings = chain.base.warnings
    if chain.repeated:
        how = "already" if len(chain.repeated) == changed else "in part"
        found = f"{len(chain.repeated)} of {changed} tensors had their new values"
        warnings += (f"the patches had been applied {how}: {found}",)
    return AppliedDelta(total, changed, len(chain.links[-1].delta.files), left_out, warnings)


def _made_folder(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_side_index(link: Link, folder: Path) -> None:
    """Write the ``index.json`` of the tuned side, if it had one."""
    index = link.side_index()
    if index is not None:
        write_whole(folder / index[0], index[1])


def folder_of(checkpoint: Checkpoint) -> Path:
    """Where a checkpoint lies."""
    return Path(checkpoint.index.path if checkpoint.index else checkpoint.shards[0].path).parent


def _is_elsewhere(checkpoint: Checkpoint) -> bool:
    return any(shard.remote is not None for shard in checkpoint.shards)


def _others(chain: Chain) -> tuple[str, ...]:
    """What lies in the base's folder beside its weights."""
    if _is_elsewhere(chain.base):
        return ()  # what lies beside it there is not listed everywhere
    folder = folder_of(chain.base)
    weights = {Path(shard.path).relative_to(folder).parts[0] for shard in chain.base.shards}
    weights |= {one.name.split("/")[0] for one in chain.links[-1].delta.files}
    if chain.base.index is not None:
        weights.add(Path(chain.base.index.path).name)
    if chain.links[-1].delta.index is not None:
        weights.add(chain.links[-1].delta.index[0])
    return tuple(sorted(path.name for path in folder.iterdir() if path.name not in weights and path.name[0] != "."))


def _link(source: Path, target: Path) -> None:
    """Give a file a second name in the result, or copy what cannot have one."""
    try:
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True)
            return
        try:
            os.link(source.resolve(), target)
        except OSError:  # another file system
            shutil.copy2(source, target)
    except OSError as error:
        raise RunFileError(f"cannot copy a file of the base: {error.strerror}", file=target, found=source) from error
