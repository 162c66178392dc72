"""Keep what a command has done in a folder beside its output, until the output is there.

A command that was killed goes on from there. What is kept are *entries*, bytes under a key, that each stand for
themselves: the same work gives the same entry, whoever does it and in whatever order. Some of them together make a
file, which gets its name when it is whole, and says by hashes what it belongs to and whether it is as it was written.
Nothing is forced onto the disk: a killed process loses the last seconds, and a power cut what the system had not
written yet, which the hashes tell.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptdiff.errors import CkptdiffError, RunFileError, first_few
from ckptdiff.files.entry_file import TEMPORARY, EntryPlace, digest_of, places_of, read_entry, write_entries

_DONE, _BELONGS, _LOCK = ".done", "belongs.json", "lock"
_OURS = re.compile(rf"\d{{8}}-[0-9a-f]{{8}}(\{_DONE}|\{TEMPORARY})|belongs(\.json|\{TEMPORARY})|lock")

_open: dict[Unfinished, None] = {}


@dataclass(frozen=True, slots=True)
class Saving:
    """How often what is done is written; no figure depends on it."""

    size: int = 4 << 20
    """Bytes that wait in memory, at most about."""
    seconds: float = 5.0
    """How long they wait, at most about: that much work is lost if the process is killed."""


SAVING = Saving()
"""That of every run, unless it is told another."""


class Unfinished:
    """The folder ``TARGET.part``, locked as long as it is open: a context manager, safe to use in many threads.

    Leaving the ``with`` block keeps what is there, unless :meth:`remove` was called, or nothing was written.

    Parameters
    ----------
    target : Path
        The output. A symbolic link is followed, so that the folder lies beside the file.
    belongs : mapping of str to str
        What the work depends on, in words: the same for every command that may go on with it.
    say : callable
        Told in words what is damaged, and on leaving what stays; in the thread that enters, ticks and leaves.
    saving : Saving, optional
    check : callable, optional
        Called before entries are written, in any thread; they are dropped if it raises: an input has changed meanwhile.

    Raises
    ------
    RunFileError
        On entry, if the folder cannot be made or is not one of ours, belongs to other work, or is in use; from
        :meth:`keep`, :meth:`tick` and :meth:`save`, if a write fails.
    """

    def __init__(
        self,
        target: Path,
        belongs: Mapping[str, str],
        say: Callable[[str], None],
        saving: Saving = SAVING,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._target, self.folder = target, folder_of(target)
        self._belongs, self._say, self._saving, self._check = dict(belongs), say, saving, check
        self._text = json.dumps(self._belongs, indent=1, sort_keys=True).encode()
        self._of = digest_of([self._text]).hex()
        self._known: dict[str, EntryPlace] = {}
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._waiting: list[tuple[str, Sequence[bytes]]] = []
        self._size, self._since = 0, 0.0
        self._damaged: list[str] = []
        self._written = 0
        self._descriptor = -1
        self._locked = self._over = self._removed = False

    def __enter__(self) -> Unfinished:
        try:
            self.folder.mkdir(exist_ok=True)
            self._require_ours()
            self._lock_folder()
            _open[self] = None
            self._require_same_work()
            self._list()
            return self
        except BaseException as error:
            # Nobody leaves what was not entered.
            if self._descriptor >= 0 and not is_unfinished(self._target):
                self.remove()
            self._close()
            if isinstance(error, OSError):
                raise RunFileError(f"cannot use the folder of --resume: {error.strerror}", file=self.folder) from error
            raise

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if not self._removed:
                self._leave(error)
            self._tell_damage()
        finally:
            self._close()

    @property
    def holds(self) -> bool:
        """Whether anything is written there."""
        return self._written > 0

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def keys(self) -> list[str]:
        """Of the entries that earlier processes kept."""
        return list(self._known)

    def find(self, key: str) -> bytes | None:
        """The bytes of an entry that an earlier process kept; None if there is none, or it is damaged."""
        place = self._known.get(key)
        if place is None:
            return None
        why = "damaged"
        try:
            if (found := read_entry(place)) is not None:
                return found
        except OSError as error:
            why = f"not readable ({error.strerror})"
        with self._lock:
            if self._known.pop(key, None) is not None:
                self._damaged.append(f"{place.path}: an entry is {why}: what it held is measured again")
        return None

    def keep(self, key: str, parts: Sequence[bytes]) -> None:
        """Keep an entry, given in parts that nobody changes any more; it is written some seconds later at most."""
        with self._lock:
            self._since = self._since if self._waiting else time.monotonic()
            self._waiting.append((key, parts))
            self._size += sum(map(len, parts))
        self._save_if_due()

    def tick(self) -> None:
        """Write what has waited long enough, and say what is damaged: to be called some times a second."""
        self._save_if_due()
        self._tell_damage()

    def save(self) -> None:
        """Write what waits."""
        with self._writing:  # one at a time: on a slow disk the others wait, and hold no more in memory
            with self._lock:
                waiting, self._waiting, self._size = self._waiting, [], 0
            if not waiting or self._over:
                return
            self._check()
            try:
                write_entries(self.folder / f"{self._written:08}-{secrets.token_hex(4)}{_DONE}", self._of, waiting)
            except OSError as error:
                self._over = True
                raise self._not_written(error) from error
            self._written += 1

    def remove(self) -> None:
        """Remove the folder, but for what others have put there: the output is in place."""
        self._removed = True
        try:
            with suppress(FileNotFoundError):
                # The last ones say whose folder it is, should the process be killed meanwhile.
                for path in [*self._files(_DONE), *self._files(TEMPORARY)]:
                    path.unlink(missing_ok=True)
                for name in (_BELONGS, _LOCK):
                    (self.folder / name).unlink(missing_ok=True)
                self.folder.rmdir()
        except OSError as error:
            self._say(f"{self.folder} stays, and may be removed: {error.strerror}")

    def _files(self, suffix: str) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.suffix == suffix and _OURS.fullmatch(path.name))

    def _lock_folder(self) -> None:
        while True:
            path = self.folder / _LOCK
            try:
                self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:  # another run has just removed the folder
                self.folder.mkdir(exist_ok=True)
                continue
            except BlockingIOError as error:
                raise RunFileError(
                    "another run with --resume is at work on this output",
                    file=self.folder,
                    hint="wait for it, or choose another name for the output",
                ) from error
            except OSError:
                if self._descriptor < 0:
                    raise
                # No locks on this file system. Of two runs at once the first to end removes the folder.
                return
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(self._descriptor)):
                    self._locked = True
                    return
            os.close(self._descriptor)  # locked, and no longer the file of that name
            self._descriptor = -1

    def _require_ours(self) -> None:
        strange = sorted(path.name for path in self.folder.iterdir() if not _OURS.fullmatch(path.name))
        if strange and not (self.folder / _BELONGS).exists():
            raise self._not_ours(first_few(strange))

    def _require_same_work(self) -> None:
        path = self.folder / _BELONGS
        if not self._files(_DONE):
            temporary = path.with_suffix(TEMPORARY)
            with temporary.open("wb") as file:
                file.write(self._text)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
            return
        try:
            known = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise self._not_ours(f"no {_BELONGS}") from None
        except ValueError:
            known = None
        if not isinstance(known, dict):
            raise self._not_ours(f"a {_BELONGS} that is damaged")
        differ = [key for key in {**known, **self._belongs} if known.get(key) != self._belongs.get(key)]
        if differ:
            raise RunFileError(
                "what is kept there belongs to another run",
                file=self.folder,
                expected=_listed(differ, known),
                found=_listed(differ, self._belongs),
                hint=f"the checkpoints and options of that run; or remove {self.folder} to begin anew",
            )

    def _not_ours(self, found: str) -> RunFileError:
        return RunFileError(
            "the folder of --resume is not one that an unfinished run left",
            file=self.folder,
            found=found,
            hint="remove it, or choose another name for the output",
        )

    def _list(self) -> None:
        for path in self._files(TEMPORARY) if self._locked else ():
            path.unlink(missing_ok=True)
        for path in self._files(_DONE):
            self._written = max(self._written, int(path.name[:8]) + 1 if path.name[:8].isdecimal() else 0)
            try:
                self._known.update(places_of(path, self._of))
            except ValueError as error:
                self._say(f"{path} is {error}: what it held is measured again")
                path.unlink(missing_ok=True)

    def _save_if_due(self) -> None:
        with self._lock:
            waited = time.monotonic() - self._since if self._waiting else -1.0
            due = self._waiting and (self._size >= self._saving.size or waited >= self._saving.seconds)
        if due:
            self.save()

    def _leave(self, error: BaseException | None) -> None:
        try:
            self.save()
        except CkptdiffError:
            if error is None:
                raise
        if not self.holds:
            self.remove()
        elif error is not None:
            self._say(going_on(self.folder))

    def _tell_damage(self) -> None:
        with self._lock:
            damaged, self._damaged = self._damaged, []
        for text in damaged:
            self._say(text)

    def _close(self) -> None:
        self._over = True  # for threads that still end
        _open.pop(self, None)
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _not_written(self, error: OSError) -> RunFileError:
        found = None
        with suppress(OSError):
            free = os.statvfs(self.folder)
            found = f"{free.f_bavail * free.f_frsize:,} bytes free"
        return RunFileError(
            f"cannot keep what is done: {error.strerror}",
            file=self.folder,
            found=found,
            hint="make room, then the same command, which goes on from there",
        )


def folder_of(target: Path) -> Path:
    """Where what is done for an output is kept."""
    real = Path(os.path.realpath(target))
    return real.with_name(f"{real.name}.part")


def is_unfinished(target: Path) -> bool:
    """Whether something is kept that was done for an output."""
    return any(folder_of(target).glob(f"*{_DONE}"))


def going_on(folder: Path) -> str:
    """What to say of a folder that stays."""
    return f"what is done is kept in {folder}: the same command goes on from there"


def left_open() -> list[Path]:
    """Folders that a process which ends now leaves, with something in them."""
    return [one.folder for one in list(_open) if one.holds]


def _listed(keys: Sequence[str], words: Mapping[str, Any]) -> str:
    return "; ".join(f"{key} {words.get(key) or 'none'}" for key in keys)
