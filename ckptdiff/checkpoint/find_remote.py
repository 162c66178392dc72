"""Find the files that make up the checkpoint at a URL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import urlsplit

from ckptdiff.checkpoint.find import FoundShards, check_numbers, some_of, warn_of_families
from ckptdiff.checkpoint.foreign import CONVERT_PICKLE, foreign_files
from ckptdiff.checkpoint.index import MAX_INDEX_BYTES, check_shard_name, parse_index
from ckptdiff.errors import CheckpointError, IndexFileError
from ckptdiff.remote.address import Address, Url
from ckptdiff.remote.hub import HubFile
from ckptdiff.remote.object_store import BucketObject, is_object, list_folder

__all__ = ["address_of", "find_remote", "in_folder"]

_INDEX = "model.safetensors.index.json"
_INDEX_SUFFIX = ".safetensors.index.json"


def find_remote(url: str) -> FoundShards:
    """Find the shards that a URL means; fetches the index if there is one, and no header.

    A URL with a query, or whose path ends in ``.safetensors``, is a file; one that ends in ``.index.json`` an index.
    All others are folders: object stores list theirs, and of other hosts those names are tried that the Hugging Face
    libraries give to an index and to a single file.

    Raises
    ------
    IndexFileError
        An index that cannot be used.
    CheckpointError
        Nothing that can be read, no safetensors, several possible indexes, or a numbered shard missing.
    """
    parts = urlsplit(url)
    name = parts.path.rpartition("/")[2]
    at = address_of(url)
    if name.endswith(".bin.index.json"):
        raise CheckpointError("an index of pickles", file=at.shown, expected="safetensors", hint=CONVERT_PICKLE)
    if name.endswith(".index.json"):
        return _from_index(at)
    if name.endswith(".safetensors") or parts.query:
        return _of(at)
    folder = f"{url.rstrip('/')}/"
    if is_object(url):
        return in_folder(BucketObject(folder), list_folder(folder))
    return _by_names(Url(folder))


def address_of(url: str) -> Address:
    """The address of a file by its URL, also by what is shown of one that has no secrets."""
    if is_object(url):
        return BucketObject(url)
    if url.startswith("hf://"):
        model, _, inside = url.removeprefix("hf://").partition("@")
        return HubFile(model, *inside.split("/", 1))
    return Url(url)


def _of(*addresses: Address) -> FoundShards:
    held: dict[str, tuple[Address | None, str]] = {address.shown: (address, "") for address in addresses}
    return FoundShards(tuple(held), None, (), (), held)


def in_folder(folder: Address, names: Sequence[str]) -> FoundShards:
    """Find shards among the names in a folder, as in one on disk, but for what lies in its subfolders.

    Parameters
    ----------
    folder : Address
        Of a file of no name in it.
    names : sequence of str

    Raises
    ------
    IndexFileError, CheckpointError
        As :func:`find_remote` does.
    """
    names = [name for name in names if name and not name.startswith(".")]
    indexes = [name for name in names if name.endswith(_INDEX_SUFFIX)]
    if _INDEX in indexes:
        indexes = [_INDEX]
    if len(indexes) > 1:
        raise CheckpointError(
            "the folder holds several checkpoints",
            file=folder.shown,
            expected="one index file",
            found=some_of(indexes),
            hint="name one of these index files",
        )
    shards = [name for name in names if name.endswith(".safetensors")]
    if indexes:
        found = _from_index(folder.beside(indexes[0]))
        unlisted = tuple(name for name in shards if found.index and name not in found.index.shard_paths)
        warnings = (f"{folder.shown}{indexes[0]} does not name {some_of(unlisted)}: not read",) if unlisted else ()
        return replace(found, warnings=warnings, unread=unlisted)
    if not shards:
        foreign = foreign_files(list(names))
        raise CheckpointError(
            f"the folder holds {foreign[0]} and no safetensors" if foreign else "the folder holds no safetensors",
            file=folder.shown,
            expected="*.safetensors or *.safetensors.index.json",
            found=some_of(names) if names else "nothing",
            hint=foreign[2] if foreign else None if names else "check the name",
        )
    check_numbers(folder.shown, shards)
    return replace(_of(*map(folder.beside, shards)), warnings=warn_of_families(folder.shown, shards))


def _by_names(folder: Url) -> FoundShards:
    """Of a host that lists nothing."""
    try:
        return _from_index(folder.beside(_INDEX))
    except CheckpointError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
    return _of(folder.beside("model.safetensors"))


def _from_index(at: Address) -> FoundShards:
    from ckptdiff.remote.transport import fetch_whole

    held: dict[str, tuple[Address | None, str]] = {}

    def locate(tensor: str, shard: str) -> str:
        check_shard_name(at.shown, tensor, shard)
        if shard.endswith((".bin", ".pt", ".pth")):
            raise IndexFileError(
                "the index names a pickle, and these are read from local folders alone",
                file=at.shown,
                tensor=tensor,
                expected="*.safetensors",
                found=shard,
                hint="download the folder, and name that",
            )
        address = at.beside(shard)
        held[address.shown] = address, ""
        return address.shown

    index = parse_index(at.shown, fetch_whole(at, MAX_INDEX_BYTES, IndexFileError), locate)
    paths = tuple(index.shard_paths[name] for name in sorted(index.shard_paths))
    return FoundShards(paths, index, (), (), held)
