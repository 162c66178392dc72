"""Write a file that goes to an object store: here first, and there when it is complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from ckptdiff.errors import RunFileError
from ckptdiff.remote.address import is_url, shown

__all__ = ["written_to"]


@contextmanager
def written_to(out: str | os.PathLike[str] | None) -> Iterator[Path | None]:
    """Where to write what is to go to `out`: that path; for a URL a file in a temporary folder, uploaded at the end.

    Raises
    ------
    RunFileError
        A URL that nothing can be uploaded to, or an upload that fails; the complete file is kept then, and named.
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
    folder = Path(tempfile.mkdtemp(prefix="ckptdiff-"))
    try:
        yield folder / name
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        if (folder / name).exists():
            upload(folder / name, url)
    except RunFileError as error:
        error.hint = f"it is complete at {folder / name}: copy it from there. {error.hint or ''}".rstrip()
        raise
    shutil.rmtree(folder, ignore_errors=True)
