"""Open and read a regular file, and nothing else: a FIFO must not block and a device must not answer."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckptdiff.errors import ChangedFileError, CheckpointError

__all__ = ["open_regular", "read_bytes", "read_whole", "stat_path"]

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO (named pipe)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def stat_path(path: str) -> os.stat_result:
    """Ask for a path's status, following symbolic links.

    Raises
    ------
    CheckpointError
        Missing, a symbolic link that leads nowhere, not permitted, or not a possible path.
    """
    try:
        return Path(path).stat()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


@contextmanager
def open_regular(path: str) -> Iterator[tuple[int, os.stat_result]]:
    """Open a regular file for reading; yields its descriptor and status, and closes it afterwards.

    Raises
    ------
    CheckpointError
        Anything but a regular file, or one that cannot be opened.
    """
    _require_regular(path, stat_path(path))
    try:
        # O_NONBLOCK: should the path have become a FIFO since the check above, open must still return.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    try:
        status = os.fstat(descriptor)
        _require_regular(path, status)
        yield descriptor, status
    finally:
        os.close(descriptor)


def read_bytes(descriptor: int, count: int, offset: int, path: str) -> bytes:
    """Read exactly `count` bytes at `offset`.

    Raises
    ------
    ChangedFileError
        The file ends early, though it was long enough when it was opened.
    CheckpointError
        The system cannot read it.
    """
    pieces: list[bytes] = []
    missing = count
    while missing:
        try:
            piece = os.pread(descriptor, missing, offset + count - missing)
        except OSError as error:
            raise _unreadable(path, error) from error
        if not piece:
            raise ChangedFileError(
                "the file shrank while it was read",
                file=path,
                expected=f"{count} bytes at offset {offset}",
                found=f"{count - missing}",
                hint="wait until nothing writes to it, then run again",
            )
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def read_whole(path: str, limit: int, too_long: type[CheckpointError] = CheckpointError) -> bytes:
    """Read a whole regular file that is at most `limit` bytes long.

    Raises
    ------
    CheckpointError
        A file that cannot be read, or of the class `too_long` for a longer one.
    """
    with open_regular(path) as (descriptor, status):
        if status.st_size > limit:
            raise too_long(
                "the file is too long",
                file=path,
                expected=f"at most {limit} bytes",
                found=f"{status.st_size} bytes",
            )
        return read_bytes(descriptor, status.st_size, 0, path)


def _require_regular(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(
            "not a regular file",
            file=path,
            expected="a regular file",
            found=_KINDS.get(stat.S_IFMT(status.st_mode), "a special file"),
        )


def _unreadable(path: str, error: OSError | ValueError) -> CheckpointError:
    if isinstance(error, ValueError):
        return CheckpointError("not a possible path", file=path, found=str(error))
    if isinstance(error, FileNotFoundError):
        if Path(path).is_symlink():
            return CheckpointError(
                "a symbolic link leads nowhere",
                file=path,
                expected="a file",
                found=f"a link to {Path(path).readlink()}, which does not exist",
                hint="the download may be incomplete: download it again",
            )
        return CheckpointError("no such file or directory", file=path)
    if isinstance(error, PermissionError):
        return CheckpointError(
            "no permission to read",
            file=path,
            hint="give yourself read permission on the file, and search permission on its folders",
        )
    return CheckpointError("cannot be read", file=path, found=error.strerror or str(error))
