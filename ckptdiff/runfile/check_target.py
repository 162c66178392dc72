"""Check where a run file or an export is to go, before any work is done."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

import h5py

from ckptdiff.errors import RunFileError
from ckptdiff.runfile.schema import FORMAT
from ckptdiff.runfile.typed import text_of

TRACK_FORMAT = "ckptdiff-track"
_KINDS = {FORMAT: "ckptdiff run file", TRACK_FORMAT: "ckptdiff track file"}


def check_target(target: Path, inputs: Iterable[tuple[str | os.PathLike[str], int, int]], format: str = FORMAT) -> None:
    """Refuse a target that a run file could not, or must not, replace.

    Parameters
    ----------
    target : Path
        Where the run file is to go.
    inputs : iterable of (path, device, inode)
        Every shard that will be read.
    format : str
        What a file that is there must be to be replaced: its root attribute ``format``.

    Raises
    ------
    RunFileError
        ``-``; no such folder, or one that cannot be written to; a directory or another special file; a shard of
        either side, also under another name; an existing file that is not a ckptdiff run file.
    """
    if str(target) == "-":
        raise RunFileError("a run file cannot go to standard output: HDF5 needs a file", hint="give -o a file name")
    check_folder(target)
    try:
        status = target.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunFileError(f"cannot look at the output: {error.strerror}", file=target) from error
    real = os.path.realpath(target)
    for path, device, inode in inputs:
        if (device, inode) == (status.st_dev, status.st_ino) or real == os.path.realpath(path):
            raise RunFileError(
                "the output is one of the inputs",
                file=target,
                found=os.fspath(path),
                hint="choose another name for the output",
            )
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise RunFileError("the output is not a file", file=target, expected="a file name", found=kind)
    if not is_of(target, format):
        raise RunFileError(
            f"the output exists and is not a {_KINDS[format]}",
            file=target,
            hint="remove it, or choose another name",
        )


def check_folder(target: Path) -> None:
    """Raise RunFileError for a target that is a folder, or whose folder is missing, not one, or not writable."""
    _check_parent(target)
    if target.is_dir():
        raise RunFileError("the output is a directory", file=target, expected="a file name", found="a directory")


def check_new(target: Path) -> None:
    """Raise RunFileError for a target that exists, or whose folder is missing, not a folder, or not writable."""
    _check_parent(target)
    try:
        target.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunFileError(f"cannot look at the output: {error.strerror}", file=target) from error
    raise RunFileError(
        "the output exists", file=target, expected="a new name", hint="remove it, or choose another name"
    )


def _check_parent(target: Path) -> None:
    # A symbolic link is followed: the file it names is replaced, and the link stays.
    folder = Path(os.path.realpath(target)).parent
    if not folder.exists():
        raise RunFileError("the output folder does not exist", file=target, found=folder, hint=f"mkdir -p {folder}")
    if not folder.is_dir():
        raise RunFileError("the output folder is not a folder", file=target, found=folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RunFileError(
            "the output folder is not writable",
            file=target,
            found=folder,
            hint="choose a folder of your own",
        )


def is_of(path: Path, format: str) -> bool:
    """Whether a file has a root attribute ``format`` that says so."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            return text_of(file, "format") == format
    except (OSError, KeyError, TypeError, ValueError):
        return False
