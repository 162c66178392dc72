"""Find the files that make up a checkpoint of the hub: in its cache, after a download, or where they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckptdiff.checkpoint.find import FoundShards, find_shards
from ckptdiff.checkpoint.find_remote import in_folder
from ckptdiff.remote.hub import cached_folder, download, is_offline, look_up, require_hub

__all__ = ["find_hub"]

_BESIDE = ("config.json", "hf_quant_config.json")


def find_hub(path: str, stream: bool) -> FoundShards:
    """Find the shards of a model in the hub.

    Parameters
    ----------
    path : str
        ``org/name``, ``org/name@revision``, or with ``hf://`` before it, also with a folder behind it.
    stream : bool
        Whether to read them where they are; else they are downloaded first, those that the index names and no others.
        Offline they are those of the cache.

    Raises
    ------
    IndexFileError
        An index that cannot be used.
    CheckpointError
        No such model, nothing that can be read in it, or a hub that cannot be reached.
    """
    require_hub(path)
    if is_offline():
        folder, origin = cached_folder(path)
        return replace(find_shards(folder), origin=origin, path=folder)
    place = look_up(path)
    found = in_folder(place.address, list(place.hashes))
    names = {shown.removeprefix(place.address.shown): shown for shown in found.elsewhere}
    hashes = {name: place.hashes[name] for name in sorted(names) if place.hashes.get(name)}
    known = {"repo": place.repo, "commit": place.commit, "hashes": hashes}
    if stream:
        held = {shown: (found.elsewhere[shown][0], place.hashes.get(name, "")) for name, shown in sorted(names.items())}
        return replace(found, elsewhere=held, origin=known, path=place.address.shown.rstrip("/"))
    beside = [name for name in place.hashes if name.endswith(".index.json") or name in _BESIDE]
    folder = download(place, [*names, *beside])
    local = find_shards(folder)
    of_path = {shard: (None, hashes.get(str(Path(shard).relative_to(folder)), "")) for shard in local.paths}
    warnings = (*found.warnings, *local.warnings)
    # What was not downloaded is no shard of it either.
    return FoundShards(local.paths, local.index, warnings, found.unread, of_path, known, folder)
