"""Apply exact deltas to a checkpoint where it lies, so that a kill at any moment leaves what can be gone on with."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ckptdiff.errors import OptionError, PatchError
from ckptdiff.events import Listener, stage
from ckptdiff.files.staged import sync_folder, write_whole
from ckptdiff.patch.applying import AppliedDelta, PathLike, applied, folder_of, open_chain, write_side_index
from ckptdiff.patch.chain import Chain
from ckptdiff.patch.making import Making, kind_of
from ckptdiff.patch.spans import threads_for
from ckptdiff.remote.address import is_url, shown
from ckptdiff.remote.hub import may_be_hub

__all__ = ["apply_in_place"]

JOURNAL = ".ckptdiff-patch.json"
"""What is in place already, while a patch is applied in place."""


def apply_in_place(
    base: PathLike, patches: Sequence[PathLike], *, threads: int = 0, listener: Listener | None = None
) -> AppliedDelta:
    """Apply patches to a checkpoint where it lies, file by file; the same call goes on where a killed one stopped.

    All digests are checked before the first file changes. Then each file is written beside its old self and takes its
    name when it is complete, so none is ever half new; a journal in the folder says which patches are being applied,
    until all files are new.

    Parameters
    ----------
    base, patches, threads, listener : as :func:`apply` takes them

    Returns
    -------
    AppliedDelta

    Raises
    ------
    PatchError
        As :func:`apply`; or the files of the result are not those of the base, so that it has to go to a new place; or
        other patches were being applied here.
    OptionError
        The base lies elsewhere, or is named as a model of the hub.

    Examples
    --------
    >>> from ckptdiff import patch
    >>> base, tuned = "fixtures/addition/base", "fixtures/addition/tuned"
    >>> made = patch.make(base, tuned, "on.ckptdelta"), patch.make(tuned, base, "back.ckptdelta")
    >>> copied = patch.apply(base, ["on.ckptdelta"], "served")
    >>> patch.apply_in_place("served", ["back.ckptdelta"]).changed
    24
    """
    if is_url(os.fspath(base)) or may_be_hub(os.fspath(base)):
        raise OptionError(
            "a checkpoint elsewhere cannot be changed where it lies, nor what the cache holds of it",
            file=shown(os.fspath(base)),
            expected="a folder or file here",
            hint="write the result to a new place: -o OUT",
        )
    with open_chain(base, patches, listener) as chain:
        link = chain.links[-1]
        folder, files = folder_of(chain.base), link.delta.files
        places = _places(chain)
        journal, now = folder / JOURNAL, {place: _stamp(folder / place) for place in places}
        begun = _begun(journal, chain, now)
        done = [one for one, place in enumerate(places) if now[place] != begun.get(place, now[place])]
        total = sum(one.size for one in files)
        with stage(listener, "patching", total if begun else 2 * total, "bytes") as told:
            making = Making(chain, threads_for(threads), told)
            if not begun:
                for one in range(len(files)):
                    making.check(one)
                record = {"patches": [one.identity for one in chain.links], "files": now}
                write_whole(journal, json.dumps(record).encode())
            # Files that were written before a kill; nobody may have put others there meanwhile.
            making.compare(chain.base, [name for name, one in chain.tensors.items() if one.file in done])
            for one, place in enumerate(places):
                if one not in done:
                    making.file(files[one], folder / place)
        write_side_index(link, folder)
        journal.unlink()
        sync_folder(folder)
        return applied(chain, ())


def _places(chain: Chain) -> list[str]:
    """Names of the base's files that take those of the result, each of which is made of its old self alone."""
    link, folder = chain.links[-1], folder_of(chain.base)
    shard_names = {shard.path: Path(shard.path).relative_to(folder).as_posix() for shard in chain.base.shards}
    places = list(shard_names.values()) if link.delta.single else [one.name for one in link.delta.files]
    index = None if chain.base.index is None else Path(chain.base.index.path).name
    same = {name: (kind_of(chain.base, name), shard_names[one.shard.path]) for name, one in chain.base.tensors.items()}
    differ = [
        name
        for name, one in chain.tensors.items()
        if len(places) != len(link.delta.files) or same.get(name) != ((one.dtype, one.shape), places[one.file])
    ]
    if differ or len(same) != len(chain.tensors) or index != (link.delta.index and link.delta.index[0]):
        raise PatchError(
            "the result has other tensors or files than the base, and cannot be made in place",
            file=link.path,
            tensor=differ[0] if differ else None,
            expected=f"the tensors of {chain.base.path}, each in the same file",
            found="another dtype, shape or file, or none" if differ else "fewer tensors, or another index",
            hint="write it to a new place: -o OUT",
        )
    return places


def _stamp(path: Path) -> list[int]:
    """What changes when a file takes the name of another."""
    status = path.stat()
    return [status.st_dev, status.st_ino, status.st_mtime_ns]


def _begun(journal: Path, chain: Chain, now: dict[str, list[int]]) -> dict[str, list[int]]:
    """The files as they were when these patches were begun to be applied here; nothing if none has changed yet."""
    try:
        record = json.loads(journal.read_text())
        patches, files = record["patches"], dict(record["files"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PatchError(
            "the journal of a patch that was begun here cannot be read", file=journal, found=error
        ) from error
    if files == now:
        return {}
    if patches != [one.identity for one in chain.links] or files.keys() != now.keys():
        raise PatchError(
            "other patches are being applied here, or were when they were killed",
            file=journal,
            hint="apply those again, which goes on where they stopped",
        )
    return files
