"""Write a file that goes to an object store: here first, and there when it is complete."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from ckptdiff.errors import RunFileError
from ckptdiff.remote.address import is_url, shown

__all__ = ["written_to"]


@contextmanager
def written_to(out: str | os.PathLike[str] | None, resume: bool = False) -> Iterator[Path | None]:
    """Where to write what is to go to `out`: that path; for a URL a file in a temporary folder, uploaded at the end.

    With `resume` that folder is the same each time, and what lies beside the file stays there until it is uploaded.

    Raises
    ------
    RunFileError
        A URL that nothing can be uploaded to, or an upload that fails; the complete file is kept then, and named. Or,
        with `resume`, a complete file of an earlier run that has not been uploaded.
    CheckpointError
        An object store that cannot be reached, before anything is done.
    """
    if out is None or not is_url(os.fspath(out)):
        yield None if out is None else Path(out)
        return
    from ckptdiff.remote.object_store import is_object, list_folder, upload

    url = os.fspath(out)
    name = urlsplit(url).path.rpartition("/")[2]
    if not is_object(url) or not name:
        raise RunFileError(
            "nothing can be written to this URL",
            file=shown(url),
            expected="a file, or an object such as s3://bucket/run.h5",
            found="no name of an object" if is_object(url) else f"a URL of {urlsplit(url).scheme}",
        )
    list_folder(url.removesuffix(name))  # hours before it is needed
    folder = _lasting(url) if resume else Path(tempfile.mkdtemp(prefix="ckptdiff-"))
    if (folder / name).exists():
        raise RunFileError(
            "the run file of an earlier run is complete, and was not uploaded",
            file=folder / name,
            expected=f"none that still has to go to {shown(url)}",
            found="one, which this run would replace",
            hint="copy it there, or remove it",
        )
    try:
        yield folder / name
    except BaseException:
        if resume and any(folder.iterdir()):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        if (folder / name).exists():
            upload(folder / name, url)
        elif resume and any(folder.iterdir()):
            return  # nothing was to be made, as with --dry-run: what is kept stays
    except RunFileError as error:
        error.hint = f"it is complete at {folder / name}: copy it from there. {error.hint or ''}".rstrip()
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _lasting(url: str) -> Path:
    """A folder of ours for what goes to a URL, made or found again by another run."""
    told = hashlib.sha256(url.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"ckptdiff-{os.geteuid()}-{told}")
    with suppress(FileExistsError):
        folder.mkdir(0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise RunFileError(
            "the folder in which --resume keeps what is done is not ours alone",
            file=folder,
            expected="a folder of this user that nobody else may write to",
            hint="remove it, or name another temporary folder: TMPDIR",
        )
    return folder
