"""Give a folder its name only when all its files are complete."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from ckptdiff.errors import CkptdiffError, RunFileError
from ckptdiff.files.hidden import Hidden
from ckptdiff.files.staged import sync_folder


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
