"""Tell what kind of patch a path is, and open it as a link of a chain."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from ckptdiff.checkpoint import read_header
from ckptdiff.errors import CheckpointError, OptionError
from ckptdiff.exports.patch import PATCH_FORMAT
from ckptdiff.patch.delta_file import is_delta, open_delta
from ckptdiff.patch.directory_link import link_of_folder
from ckptdiff.patch.flat_link import link_of_flat
from ckptdiff.patch.link import GivenSide, Link
from ckptdiff.patch.make_flat import FLAT_FORMAT

__all__ = ["open_link", "patch_kind"]

_NAMES = {"delta": "ckptdiff's own format", "folder": "delta-dir", "flat": "flat", "mask": "patch of a mask"}


def patch_kind(path: str | os.PathLike[str]) -> Literal["delta", "folder", "flat", "mask"]:
    """What a path seems to be; "delta" also of what is no patch.

    Raises CheckpointError if it cannot be read.
    """
    if Path(path).is_dir():
        return "folder"
    if is_delta(path):
        return "delta"
    try:
        format = read_header(path)[0].metadata.get("format")
    except CheckpointError:
        return "delta"
    return "flat" if format == FLAT_FORMAT else "mask" if format == PATCH_FORMAT else "delta"


def open_link(
    path: str | os.PathLike[str], base: GivenSide, before: Sequence[tuple[str, Any]]
) -> tuple[str, AbstractContextManager[Link]]:
    """Open a patch behind those before it, each of which is given with its kind; returns the same of this one."""
    kind = patch_kind(path)
    if before and before[0][0] != kind:
        raise OptionError(
            "patches of different formats cannot be applied at once",
            file=Path(path),
            expected=_NAMES[before[0][0]],
            found="a folder" if kind == "folder" else _NAMES[kind],
            hint="apply one after the other; patch verify takes a checkpoint to compare with by --tuned",
        )
    links = [link for _, link in before]
    if kind == "folder":
        return kind, link_of_folder(path, base, links)
    return kind, link_of_flat(path, base, links) if kind == "flat" else open_delta(path)
