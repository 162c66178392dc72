"""Find the files that make up checkpoints of the hub: in its cache, after a download, or where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ckptdiff.checkpoint.find import FoundShards, find_shards
from ckptdiff.checkpoint.find_remote import in_folder
from ckptdiff.remote.hub import HubFolder, cached_folder, download, is_offline, link_cached, look_up, require_hub

__all__ = ["find_hub", "find_hub_pair"]

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
    return _find(look_up(path), lambda content: stream)


def find_hub_pair(base: str, tuned: str, quick: bool) -> tuple[FoundShards, FoundShards]:
    """Find the shards of two models, and download them: those of equal hash once, or, if `quick`, not at all.

    Errors as of :func:`find_hub`.
    """
    require_hub(base)
    if is_offline():
        return find_hub(base, False), find_hub(tuned, False)
    first, second = look_up(base), look_up(tuned)
    both = ({*first.hashes.values()} & {*second.hashes.values()}) - {""}
    if quick:
        return _find(first, both.__contains__), _find(second, both.__contains__)
    # Whichever of them the cache has.
    link_cached(second, first)
    found = _find(first, lambda content: False)
    link_cached(first, second)
    return found, _find(second, lambda content: False)


def _find(place: HubFolder, stays: Callable[[str], bool]) -> FoundShards:
    """The shards of a model: those whose hash says so where they are, the others in the cache."""
    found = in_folder(place.address, list(place.hashes))
    names = {shown.removeprefix(place.address.shown): shown for shown in found.elsewhere}
    hashes = {name: place.hashes[name] for name in sorted(names) if place.hashes.get(name)}
    known = {"repo": place.repo, "commit": place.commit, "hashes": hashes}
    there = {name for name in names if stays(hashes.get(name, ""))}
    held = {shown: (found.elsewhere[shown][0], hashes.get(name, "")) for name, shown in sorted(names.items())}
    called = place.address.shown.rstrip("/")
    if there == names.keys():
        return replace(found, elsewhere=held, origin=known, path=called)
    beside = [name for name in place.hashes if name.endswith(".index.json") or name in _BESIDE]
    folder = Path(download(place, [*(name for name in names if name not in there), *beside]))
    if there:
        at = {shown: shown if name in there else str(folder / name) for name, shown in names.items()}
        held = {
            at[shown]: held[shown] if at[shown] == shown else (None, content) for shown, (_, content) in held.items()
        }
        index = found.index and replace(
            found.index,
            path=str(folder / Path(found.index.path).name),
            shard_paths={name: at[shown] for name, shown in found.index.shard_paths.items()},
        )
        paths = tuple(at[shown] for shown in found.paths)
        return replace(found, paths=paths, index=index, elsewhere=held, origin=known, path=called)
    local = find_shards(str(folder))
    of_path = {shard: (None, hashes.get(str(Path(shard).relative_to(folder)), "")) for shard in local.paths}
    warnings = (*found.warnings, *local.warnings)
    # What was not downloaded is no shard of it either.
    return FoundShards(local.paths, local.index, warnings, found.unread, of_path, known, str(folder))
