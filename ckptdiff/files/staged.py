"""Give a file, or a folder, its name only when it is complete."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from ckptdiff.errors import CkptdiffError, RunFileError
from ckptdiff.files.hidden import Hidden

_WRITE_BACK = 2  # SYNC_FILE_RANGE_WRITE
_AT_ONCE = 8 << 20
"""Bytes after which the disk is asked to begin with what was written in pieces."""
_FOLDERS_NOT_SYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)
_libc = ctypes.CDLL(None)


def _write_back(descriptor: int, offset: int, size: int) -> None:
    """Begin to write dirty pages, where the system can be asked to: else all of a file waits until it is synced."""
    begin = getattr(_libc, "sync_file_range", None)
    if begin is not None and size:
        begin(descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), _WRITE_BACK)


class StagedFile:
    """A new file beside its target that replaces the target when it is committed: a context manager.

    Leaving the ``with`` block without a :meth:`commit`, for whatever reason, removes what was written and leaves the
    target as it was. Entering it removes what killed processes left of the same target.

    It can be handed to h5py as a file object. HDF5 crashes the process at a later close when one of its writes fails
    (seen with 2.0: segmentation fault on a full disk) and may lose an interrupt that it meets, so whatever ends a write
    early is not raised but kept in :attr:`failure`, later writes are dropped, and whoever writes asks :meth:`check`.

    Parameters
    ----------
    target : Path
        The final name. A symbolic link is followed, so that the file it names is replaced.

    Attributes
    ----------
    failure : BaseException or None
        What ended the first failed write: an OSError, or an interrupt.

    Raises
    ------
    RunFileError
        On entry, if the file cannot be made.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.failure: BaseException | None = None
        self._real = Path(os.path.realpath(target))
        self._hidden = Hidden(self._real)
        self._stopped = False
        self._position = 0
        self._size = 0
        self._unasked = 0

    def __enter__(self) -> StagedFile:
        try:
            self._hidden.make_file()
            return self
        except OSError as error:
            raise RunFileError(f"cannot create the output: {error.strerror}", file=self.target) from error
        except BaseException:  # a signal came with the file: nobody leaves what was not entered
            self.discard()
            raise

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.stop()
        self.discard()
        if isinstance(error, Exception) and not isinstance(error, CkptdiffError):
            # HDF5 stumbles over what a failed write left out; the failed write is the reason to tell.
            self.check()
            cause: BaseException | None = error
            while isinstance(cause, Exception):
                cause = cause.__cause__ or cause.__context__
            if cause is not None:
                # An interrupt that came just before the first line of a write, which h5py has wrapped in a SystemError.
                raise cause

    @property
    def descriptor(self) -> int:
        """Of the file while it has no name, for code that reads what was written."""
        return self._hidden.descriptor

    def check(self) -> None:
        """Raise the failure of an earlier write, if there was one.

        It is a RunFileError for a full disk, a quota, or whatever else ended a write, and an interrupt that came in a
        write as it was.
        """
        if isinstance(self.failure, OSError):
            raise self._explained(self.failure) from self.failure
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """Drop every later write."""
        self._stopped = True

    def commit(self) -> None:
        """Bring the file to the disk, then give it its name; raises RunFileError if a write failed, now or earlier."""
        self.check()
        try:
            os.fsync(self._hidden.descriptor)
            self._hidden.take_name()
            sync_folder(self._real.parent)
        except OSError as error:
            raise self._explained(error) from error

    def discard(self) -> None:
        """Remove the temporary file; harmless before it is made and after :meth:`commit`."""
        self._hidden.remove()

    def _explained(self, error: OSError) -> RunFileError:
        hint = None
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "make room, or choose a folder on another disk"
        free = os.statvfs(self._real.parent)
        return RunFileError(
            f"cannot write the output: {error.strerror}",
            file=self.target,
            found=f"{free.f_bavail * free.f_frsize:,} bytes free, {self._size:,} bytes written",
            hint=hint,
        )

    def write_at(self, data: memoryview, offset: int) -> None:
        """Write all of a buffer at an offset, in any thread, and have the disk begin with it.

        Raises
        ------
        RunFileError
            For a full disk, a quota, or whatever else ended the write.
        """
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._hidden.descriptor, data[done:], offset + done)
            _write_back(self._hidden.descriptor, offset, len(data))
        except OSError as error:
            raise self._explained(error) from error
        self._size = max(self._size, offset + len(data))

    # What h5py's fileobj driver calls.

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to an offset from the start or from the end."""
        self._position = offset + (self._size if whence == os.SEEK_END else 0)
        return self._position

    def tell(self) -> int:
        """Where the next read or write starts."""
        return self._position

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes."""
        piece = os.pread(self._hidden.descriptor, size, self._position)
        self._position += len(piece)
        return piece

    def readinto(self, buffer: memoryview) -> int:
        """Fill a buffer, with zeros where a failed write left nothing."""
        view, count = memoryview(buffer), 0  # that of h5py 3.11 is Cython's own, to which bytes cannot be assigned
        try:
            count = os.preadv(self._hidden.descriptor, [view], self._position)
        except BaseException as error:
            self.failure = self.failure or error
        view[count:] = bytes(len(view) - count)
        self._position += len(view)
        return len(view)

    def write(self, data: memoryview | bytes) -> int:
        """Write all of a buffer, unless a write has failed."""
        view = memoryview(data)
        done = 0
        try:
            while done < len(view) and self.failure is None and not self._stopped:
                done += os.pwrite(self._hidden.descriptor, view[done:], self._position + done)
            self._unasked += done
            if self._unasked >= _AT_ONCE:
                # The disk has then little left to do when all is written, and everyone waits for it.
                self._unasked = 0
                _write_back(self._hidden.descriptor, 0, max(self._size, self._position + done))
        except BaseException as error:
            self.failure = self.failure or error
        self._position += len(view)
        if self._position > self._size:
            self._size = self._position
        return len(view)

    def truncate(self, size: int) -> int:
        """Set the file's size."""
        try:
            os.ftruncate(self._hidden.descriptor, size)
        except BaseException as error:
            self.failure = self.failure or error
        self._size = size
        return size

    def flush(self) -> None:
        """Nothing: no write waits here."""


class StagedFolder:
    """A new folder beside its target, to be filled and then committed: a context manager.

    Leaving the ``with`` block without a :meth:`commit`, for whatever reason, removes it and all that is in it. Entering
    it removes what killed processes left of the same target. Errors about a file in it name it where it was to be.

    Nothing may have the target's name yet. Entering raises RunFileError if the folder cannot be made.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._hidden = Hidden(target)

    @property
    def path(self) -> Path:
        """Where the files are to be written."""
        return self._hidden.path

    def __enter__(self) -> StagedFolder:
        try:
            self._hidden.make_folder()
            return self
        except OSError as error:
            raise RunFileError(f"cannot create the output: {error.strerror}", file=self.target) from error
        except BaseException:  # a signal came with the folder: nobody leaves what was not entered
            self._hidden.remove()
            raise

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._hidden.remove()
        if isinstance(error, CkptdiffError) and error.file is not None:
            file = Path(error.file)
            if file.is_relative_to(self.path):
                error.file = str(self.target / file.relative_to(self.path))

    def commit(self) -> None:
        """Give the folder its name, or raise RunFileError, as when something has taken the name meanwhile."""
        try:
            self._hidden.take_name()
            sync_folder(self.target.parent)
        except OSError as error:
            raise RunFileError(f"cannot name the output: {error.strerror}", file=self.target) from error


def write_whole(target: Path, data: bytes) -> None:
    """Write a file that is small, or leave the target as it is and raise RunFileError."""
    with StagedFile(target) as staged:
        staged.write(data)
        staged.commit()


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk; raise OSError if the system cannot, though its file system could."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot; the files themselves are on the disk and have their names.
        if error.errno not in _FOLDERS_NOT_SYNCED:
            raise
    finally:
        os.close(descriptor)
