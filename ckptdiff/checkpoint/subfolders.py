"""Find weights in subfolders of a checkpoint's folder, which are none of its shards."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePath

from ckptdiff.checkpoint.foreign import pickled_weights

__all__ = ["weights_below"]

_DEPTH = 3
"""Levels below the folder that are looked into; sentence-transformers nests modules in two."""
_NUMBER = re.compile(r"[0-9]+")


def weights_below(folder: str, read: Collection[str]) -> tuple[str, ...]:
    """Find weights in the subfolders of a folder, but for hidden ones and links to folders.

    Parameters
    ----------
    folder : str
        Where to look.
    read : collection of str
        Files that are read all the same, relative to `folder`: an index may name some in a subfolder.

    Returns
    -------
    tuple of str
        One entry for each subfolder with weights, relative to `folder`, numbers in their order: the file
        ("2_Dense/model.safetensors") or, of several, a pattern ("checkpoint-500/*.safetensors"). Pickles count where a
        subfolder holds no safetensors; a subfolder that cannot be listed ("private/*") may hold some, and counts too.
    """
    return tuple(sorted(_weights(folder, PurePath(), read), key=_in_order))


def _in_order(name: str) -> str:
    return _NUMBER.sub(lambda number: number[0].zfill(20), name)


def _weights(folder: str, below: PurePath, read: Collection[str]) -> Iterator[str]:
    """Those of a folder, unless it is the first, and of all below it."""
    try:
        with os.scandir(Path(folder, below)) as found:
            entries = [entry for entry in found if not entry.name.startswith(".")]
    except FileNotFoundError:  # it went away after it was found
        return
    except OSError:
        yield str(below / "*")
        return
    if below.parts:
        names = sorted(entry.name for entry in entries if not _is_folder(entry))
        shards = [name for name in names if name.endswith(".safetensors")]
        weights = [name for name in shards or pickled_weights(names) if str(below / name) not in read]
        if weights:
            endings = {PurePath(name).suffix for name in weights}
            several = f"*{endings.pop()}" if len(endings) == 1 else "*"
            yield str(below / (weights[0] if len(weights) == 1 else several))
    if len(below.parts) < _DEPTH:
        for entry in entries:
            if _is_folder(entry, linked=False):
                yield from _weights(folder, below / entry.name, read)


def _is_folder(entry: os.DirEntry[str], *, linked: bool = True) -> bool:
    try:
        return entry.is_dir(follow_symlinks=linked)
    except OSError:  # a ring of links, or one into a folder that is closed to this user: its name tells what it may be
        return False
