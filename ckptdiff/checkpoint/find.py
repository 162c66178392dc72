"""Find the files that make up the checkpoint at a path."""

from __future__ import annotations

import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ckptdiff.checkpoint.foreign import foreign_files, pickled_weights
from ckptdiff.checkpoint.index import Index, read_index
from ckptdiff.checkpoint.regular_file import read_whole, stat_path
from ckptdiff.checkpoint.subfolders import weights_below
from ckptdiff.errors import CheckpointError
from ckptdiff.remote.address import Address
from ckptdiff.remote.hub import is_hub_name

__all__ = ["FoundShards", "check_numbers", "find_shards", "some_of", "warn_of_families"]

_NUMBERED = re.compile(
    r"(?P<stem>.*)-(?P<number>[0-9]{5,})-of-(?P<total>[0-9]{5,})(?P<ending>\.safetensors|\.bin|\.pt|\.pth)", re.DOTALL
)
_RANKED = re.compile(r"(?P<stem>.*_world_size_)(?P<total>[1-9][0-9]{0,5})_rank_(?P<number>[0-9]{1,6})\.pt", re.DOTALL)
"""How FSDP's trainers name the files of ranks."""
_OF_A_RANK = re.compile(r"shard-[0-9]{5,}-model")
"""How torch.distributed.checkpoint names them; a rank that holds nothing of a file writes none."""
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class FoundShards:
    """Where a checkpoint's tensors are to be read.

    Attributes
    ----------
    paths : tuple of str
        The shards, sorted by name.
    index : Index or None
        The index that named them.
    warnings : tuple of str
        What was left out or guessed.
    unread : tuple of str
        Weights in the folder that was named, relative to it, which are none of the shards; patterns stand for several.
    kind : {"whole", "ranks", "dcp"}
        Whether each file stores whole tensors, or each rank's has slices of them, or the one path is the ``.metadata``
        of a torch.distributed.checkpoint folder.
    """

    paths: tuple[str, ...]
    index: Index | None
    warnings: tuple[str, ...]
    unread: tuple[str, ...]
    elsewhere: Mapping[str, tuple[Address | None, str]] = field(default_factory=dict)
    """Of shards, by their path: where they are if they are no local files, and the hash of their bytes if known."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Of a model in the hub: its ``repo``, ``commit``, and the ``hashes`` of its shards."""
    path: str = ""
    """What the checkpoint is called from then on, if not what the user named."""
    kind: Literal["whole", "ranks", "dcp"] = "whole"


def find_shards(path: str) -> FoundShards:
    """Find the shards that `path` means; reads the index if there is one, and no header.

    Raises
    ------
    IndexFileError
        An index that cannot be used.
    CheckpointError
        Nothing readable, no weights, several possible indexes or snapshots, or a file of the shards or ranks missing.
    """
    try:
        status = stat_path(path)
    except CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError) and error.hint is None and is_hub_name(path):
            error.hint = "if this is a Hugging Face model: pip install 'ckptdiff[hub]'"
        raise
    if stat.S_ISDIR(status.st_mode):
        return _in_directory(path)
    name = Path(path).name
    if name.endswith(".distcp"):
        raise CheckpointError(
            "one of the files that torch.distributed.checkpoint wrote",
            file=path,
            expected="their folder, which has .metadata",
            hint=f"name the folder: {Path(path).parent}",
        )
    if name == ".metadata":
        return FoundShards((path,), None, (), (), kind="dcp")
    if _RANKED.fullmatch(name):
        return _of_ranks(str(Path(path).parent), _listing(str(Path(path).parent)), name)
    if path.endswith(".index.json"):
        # Who names an index, or a file, asks for no more than that.
        return replace(_from_index(path, _listing(str(Path(path).parent))), unread=())
    return FoundShards((path,), None, (), ())


def _in_directory(path: str) -> FoundShards:
    names = _listing(path)
    for ending, shards in ((".safetensors", _endings(names, ".safetensors")), (".bin", pickled_weights(names))):
        indexes = _endings(names, f"{ending}.index.json")
        usual = {"model.safetensors.index.json", "pytorch_model.bin.index.json"} & {*indexes}
        indexes = list(usual) or indexes
        if len(indexes) > 1:
            raise CheckpointError(
                "the folder holds several checkpoints",
                file=path,
                expected="one index file",
                found=some_of(indexes),
                hint="name one of these index files",
            )
        if indexes:
            return _with_subfolders(path, _from_index(str(Path(path, indexes[0])), names))
        ranked = [name for name in shards if _RANKED.fullmatch(name)]
        if ranked:
            return _with_subfolders(path, _of_ranks(path, names, ranked[0]))
        if shards:
            check_numbers(path, shards)
            paths = tuple(str(Path(path, name)) for name in shards)
            return _with_subfolders(path, FoundShards(paths, None, warn_of_families(path, shards), ()))
        if Path(path, ".metadata").is_file():  # beside safetensors it is of what they were made of
            return _with_subfolders(path, FoundShards((str(Path(path, ".metadata")),), None, (), (), kind="dcp"))
    if "snapshots" in names:
        return _in_directory(_snapshot(path))
    raise _nothing_to_read(path, names)


def _endings(names: Iterable[str], ending: str) -> list[str]:
    return [name for name in names if name.endswith(ending)]


def _of_ranks(path: str, names: Iterable[str], named: str) -> FoundShards:
    """The files of all ranks of a save, of which one is named."""
    match = _RANKED.fullmatch(named)
    assert match is not None
    total = int(match["total"])
    wanted = [f"{match['stem']}{match['total']}_rank_{rank}.pt" for rank in range(total)]
    present = {*names}
    missing = [name for name in wanted if name not in present]
    if missing:
        raise CheckpointError(
            "files of ranks are missing",
            file=path,
            expected=f"{total} files {match['stem']}{total}_rank_*.pt",
            found=f"{len(wanted) - len(missing)}; missing: {some_of(missing)}",
            hint="each rank writes its own: bring those of all machines together",
        )
    others = [name for name in pickled_weights(present) if _RANKED.fullmatch(name) and name not in wanted]
    warnings = (f"{path} has files of other saves, not read: {some_of(sorted(others))}",) if others else ()
    paths = tuple(str(Path(path, name)) for name in wanted)
    return FoundShards(paths, None, warnings, tuple(sorted(others)), kind="ranks")


def _from_index(path: str, siblings: Iterable[str]) -> FoundShards:
    index = read_index(path)
    of_pickles = path.endswith(".bin.index.json")
    siblings = pickled_weights(siblings) if of_pickles else _endings(siblings, ".safetensors")
    unlisted = tuple(name for name in siblings if name not in index.shard_paths)
    warnings = (f"{path} does not name {some_of(unlisted)}: not read",) if unlisted else ()
    paths = tuple(index.shard_paths[name] for name in sorted(index.shard_paths))
    return FoundShards(paths, index, warnings, unlisted)


def _with_subfolders(path: str, source: FoundShards) -> FoundShards:
    below = weights_below(path, source.index.shard_paths if source.index else ())
    if not below:
        return source
    warning = f"{path} has weights in its subfolders that are not read: {some_of(below)}"
    return replace(source, warnings=(*source.warnings, warning), unread=(*source.unread, *below))


def _listing(path: str) -> list[str]:
    """Names in a folder, sorted, without hidden ones (macOS leaves ``._model.safetensors`` behind)."""
    try:
        return sorted(entry.name for entry in Path(path).iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise CheckpointError("the folder cannot be listed", file=path, found=error.strerror or str(error)) from error


def check_numbers(path: str, names: Sequence[str]) -> None:
    """Raise CheckpointError if shards of a folder that number themselves are not all there."""
    families: defaultdict[tuple[str, str, str], set[int]] = defaultdict(set)
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match and not _OF_A_RANK.fullmatch(match["stem"]):
            families[match["stem"], match["total"], match["ending"]].add(int(match["number"]))
    for (stem, total, ending), numbers in families.items():
        first = 0 if 0 in numbers else 1
        wanted = range(first, first + int(total))
        count = len(wanted) - sum(number in wanted for number in numbers)
        if count:
            absent = islice((number for number in wanted if number not in numbers), _SHOWN)
            missing = [f"{stem}-{number:0{len(total)}d}-of-{total}{ending}" for number in absent]
            raise CheckpointError(
                "shards are missing",
                file=path,
                expected=f"{len(wanted)} files {stem}-*-of-{total}{ending}",
                found=f"{len(wanted) - count}; missing: {some_of(missing, count)}",
                hint="the download may be incomplete: download it again",
            )


def warn_of_families(path: str, names: Sequence[str]) -> tuple[str, ...]:
    """A warning where files of a folder do not look like parts of one checkpoint."""
    families = {match["stem"] if (match := _NUMBERED.fullmatch(name)) else name for name in names}
    if len(families) < 2:
        return ()
    return (f"{path} has no index: its {len(names)} files are read as one checkpoint: {some_of(names)}",)


def _snapshot(path: str) -> str:
    """Choose the snapshot of a Hugging Face cache folder ``models--ORG--NAME``."""
    folder = Path(path, "snapshots")
    names = [name for name in _listing(str(folder)) if stat.S_ISDIR(stat_path(str(folder / name)).st_mode)]
    if len(names) == 1:
        return str(folder / names[0])
    reference = Path(path, "refs", "main")
    if names and reference.is_file():
        commit = read_whole(str(reference), 1000).decode(errors="replace").strip()
        if commit in names:
            return str(folder / commit)
    raise CheckpointError(
        "the cache folder holds several snapshots" if names else "the cache folder holds no snapshot",
        file=folder,
        expected="one snapshot, or one that refs/main names",
        found=some_of(names) if names else "none",
        hint="name one of these snapshot folders" if names else "download the model again",
    )


def _nothing_to_read(path: str, names: list[str]) -> CheckpointError:
    foreign = foreign_files(names)
    if foreign is not None:
        what, found, hint = foreign
        return CheckpointError(
            f"the folder holds {what} and no safetensors",
            file=path,
            expected="*.safetensors, or what torch wrote",
            found=some_of(found),
            hint=hint,
        )
    inside = [name for name in names if _holds_weights(Path(path, name))]
    return CheckpointError(
        "the folder holds no safetensors" if names else "the folder is empty",
        file=path,
        expected="*.safetensors or *.safetensors.index.json, or what torch wrote",
        found=some_of(names) if names else "nothing",
        hint=f"name one of its folders: {some_of(inside)}" if inside else None,
    )


def _holds_weights(folder: Path) -> bool:
    try:
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        return ".metadata" in names or bool(_endings(names, ".safetensors") or pickled_weights(names))
    except OSError:
        # Only a hint depends on it, and the folder the user named has been read.
        return False


def some_of(names: Sequence[str], total: int | None = None) -> str:
    """The first of many names, and how many more there are."""
    total = len(names) if total is None else total
    shown = ", ".join(names[:_SHOWN])
    return shown if total <= _SHOWN else f"{shown} and {total - _SHOWN} more"
