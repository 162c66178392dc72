"""Hide what is not complete under names beside its target, and remove what a killed process left there."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from ckptdiff.interrupts import raise_pending

_LONGEST_STEM = 200
_TOKEN_DIGITS = 8
_MOMENT = 2.0
"""Seconds to wait for the lock of a folder, which some other program may hold for longer."""
_BOOT, _MOUNTS = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/mountinfo")
_OF_ONE_MACHINE = frozenset({"btrfs", "ext2", "ext3", "ext4", "f2fs", "tmpfs", "xfs", "zfs"})
"""File systems that only one machine at a time has mounted, and whose locks all its processes see."""

_names = threading.Lock()
"""Held while a hidden name is made or becomes the final one."""
_living: set[Hidden] = set()
"""What is under a hidden name."""


class Hidden:
    """A new file or folder under a hidden name beside its target, locked as long as its process lives.

    A process that is killed cannot remove it, so a later one with the same target does, and must not touch anything
    else. Such a name carries a *mark*, a hash that no name has by chance, and what bears a mark is locked as long as it
    has that name, but for the moment in which it is made, when the folder around it is locked. If both locks are free,
    the process is gone, whatever container it ran in. The mark also says where locks mean that: machines that share a
    folder do not know each other's marks. Where locks do not work, and on systems other than Linux, names have no mark,
    and what a killed process left stays.

    Parameters
    ----------
    target : Path
        Its final name, in a folder that exists.

    Attributes
    ----------
    path : Path
        The hidden name.
    descriptor : int
        Of the open file or folder; -1 if it is not open.
    """

    def __init__(self, target: Path) -> None:
        self._target = _real(target)
        self._token = secrets.token_hex(_TOKEN_DIGITS // 2)
        self.path = _hidden(self._target, self._token)
        self._is_folder = False
        self.descriptor = -1

    def make_file(self) -> None:
        """Make a file, open to read and write; what was abandoned is removed first. Raises as the system does."""
        remove_abandoned(self._target)
        with _names, self._making():
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def make_folder(self) -> None:
        """Make a folder; what was abandoned is removed first. Raises as the system does."""
        remove_abandoned(self._target)
        self._is_folder = True
        with _names, self._making():
            self.path.mkdir()

    def take_name(self) -> None:
        """Close it and give it its final name, in place of the file that has it. Raises as the system does.

        A signal that was noted in :mod:`ckptdiff.interrupts` is raised before it.
        """
        with _names:
            raise_pending()
            if self.descriptor >= 0:
                os.close(os.dup(self.descriptor))  # says what could not be written, and leaves it locked
            self.path.replace(self._target)
            _living.discard(self)
            self._close()

    def remove(self, *, close: bool = True) -> None:
        """Remove it and all that is in it; harmless before it is made, and once it has its final name."""
        _remove(self.path, self._is_folder)
        if close:
            _living.discard(self)
            self._close()

    @contextmanager
    def _making(self) -> Iterator[None]:
        """Mark the name of what is made within the ``with``, and lock it; what cannot be locked has no mark."""
        plain, scope = self.path, None if _is_inside(self._target) else _scope(self._target.parent)
        marked = plain if scope is None else _marked(self._target, self._token, scope)
        with _locked(self._target.parent) if scope else nullcontext() as locked:
            # Nobody looks for what is abandoned as long as the folder is locked.
            self.path = marked if locked else plain
            yield
            _living.add(self)
            if scope is None:
                return
            try:
                if self._is_folder:
                    self.descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.path = self.path.rename(marked)
            except OSError:
                self.path = self.path.rename(plain)

    def _close(self) -> None:
        # Forgotten first: if a signal comes with the closing, it is not closed a second time.
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def remove_hidden() -> None:
    """Remove all that this process has under hidden names, which is about to end: it can neither make nor name more."""
    _names.acquire()
    for hidden in list(_living):
        with suppress(OSError):
            hidden.remove(close=False)


def remove_abandoned(target: Path) -> None:
    """Remove the hidden files and folders of a target whose processes are gone; its folder need not exist.

    What belongs to another user or cannot be removed stays, and is no error: nothing depends on it.
    """
    # In a hidden folder of ours, which is locked, nobody has left anything.
    scope = None if _is_inside(target) else _scope(target.parent)
    if scope is None:
        return
    with suppress(OSError), _locked(target.parent) as locked:
        for path in () if locked is False else target.parent.iterdir():
            token = path.stem[-2 * _TOKEN_DIGITS : -_TOKEN_DIGITS]
            if path.name.startswith(".") and path.name == _marked(target, token, scope).name:
                with suppress(OSError):
                    _remove_unlocked(path)


def _real(target: Path) -> Path:
    """A target in a folder that is named without links, from the root on: so are those of ours."""
    return Path(os.path.realpath(target.parent), target.name)


def _is_inside(target: Path) -> bool:
    """Whether a target lies in a folder of ours that is hidden itself, and goes with it."""
    real = _real(target)
    return any(one._is_folder and real.is_relative_to(one.path) for one in list(_living))


@contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """Lock a folder, which others do for moments: whether it is, or None on a file system that locks no folders.

    There names are marked only after what they name is locked, and a process that is killed in between leaves it.
    """
    descriptor, locked, until = -1, None, time.monotonic() + _MOMENT
    try:
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            while not locked:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    locked = True
                except BlockingIOError:
                    locked = False
                    if time.monotonic() > until:
                        break
                    time.sleep(0.01)
        yield locked
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _remove_unlocked(path: Path) -> None:
    """Remove what no process has locked; raise OSError if one has, or if it cannot be opened.

    No other gets this name, so what is removed is what was looked at.
    """
    status = path.lstat()
    is_folder = stat.S_ISDIR(status.st_mode)
    if status.st_uid != os.geteuid() or not (is_folder or stat.S_ISREG(status.st_mode)):
        return
    # NFS locks only those files that are open for writing.
    access = os.O_RDONLY | os.O_DIRECTORY if is_folder else os.O_RDWR
    descriptor = os.open(path, access | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path, is_folder)
    finally:
        os.close(descriptor)


def _remove(path: Path, is_folder: bool) -> None:
    if is_folder:
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _hidden(target: Path, token: str) -> Path:
    # The limit is one of bytes, not of characters.
    stem = os.fsdecode(os.fsencode(target.name)[:_LONGEST_STEM])
    return target.with_name(f".{stem}.{token}.tmp")


def _marked(target: Path, token: str, scope: str) -> Path:
    text = "\0".join(("ckptdiff", token, scope, target.name))
    mark = hashlib.blake2b(os.fsencode(text), digest_size=_TOKEN_DIGITS // 2).hexdigest()
    return _hidden(target, token + mark)


def _scope(folder: Path, boot: Path = _BOOT, mounts: Path = _MOUNTS) -> str | None:
    """Name what processes that see each other's locks in a folder have in common; None if that is not known.

    On a file system of one machine, all do, at any time. On any other those do that have run since the same boot and go
    through the same mount: of file systems that machines share, some keep locks to the machine, and some to the mount.
    """
    try:
        device = folder.stat().st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        for line in mounts.read_text(errors="surrogateescape").splitlines():
            mount, _, source = line.partition(" - ")
            if mount.split()[2] == number:
                if source.split()[0] in _OF_ONE_MACHINE:
                    return "one machine"
                break
        return f"{boot.read_text().strip()} {device}"
    except OSError:
        return None
