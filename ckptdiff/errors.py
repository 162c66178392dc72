"""Raise every error from one tree: catch the root, read the leaf.

::

    CkptdiffError
    ├── OptionError           an option or argument that cannot be used
    ├── CheckpointError       a checkpoint that cannot be read
    │   ├── HeaderError       a shard whose header breaks its format
    │   ├── IndexFileError    an index.json that its shards contradict
    │   └── ChangedFileError  a shard that changed while it was read
    ├── PairingError          two checkpoints with nothing to compare
    ├── PlanError             work that does not fit the memory it may use
    ├── DeviceError           a GPU that is missing, unusable or failing
    ├── ClusterError          a Ray cluster that cannot be reached, does not fit, or fails
    ├── MaskError             masks that do not fit a model, an optimizer or each other
    ├── PatchError            a patch that is damaged, or does not fit a checkpoint
    └── RunFileError          a run file that cannot be read or written
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import import_module
from typing import Any

__all__ = [
    "ChangedFileError",
    "CheckpointError",
    "CkptdiffError",
    "ClusterError",
    "DeviceError",
    "HeaderError",
    "IndexFileError",
    "MaskError",
    "OptionError",
    "PairingError",
    "PatchError",
    "PlanError",
    "RunFileError",
    "first_few",
    "plural",
    "required",
]


class CkptdiffError(Exception):
    """Root of every error ckptdiff raises on purpose.

    Parameters
    ----------
    problem : str
        What is wrong, in one sentence without a full stop.
    file : path-like, optional
        The file it is about.
    tensor : str, optional
        The tensor it is about.
    expected, found : object, optional
        What a correct input would hold, and what this one holds.
    hint : str, optional
        What the user can do next.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = None if file is None else os.fspath(file)
        self.tensor = tensor
        self.expected = expected
        self.found = found
        self.hint = hint
        super().__init__(problem)

    def __str__(self) -> str:
        facts = [
            ("file", self.file),
            ("tensor", self.tensor),
            ("expected", self.expected),
            ("found", self.found),
            ("try", self.hint),
        ]
        lines = [self.problem]
        lines += [f"  {label + ':':<10}{value}" for label, value in facts if value is not None]
        return "\n".join(lines)


class OptionError(CkptdiffError):
    """An option or argument that cannot be used."""


class CheckpointError(CkptdiffError):
    """A checkpoint that cannot be read."""


class HeaderError(CheckpointError):
    """A shard whose header breaks its format."""


class IndexFileError(CheckpointError):
    """An ``index.json`` that its shards contradict."""


class ChangedFileError(CheckpointError):
    """A shard that changed, shrank or vanished while it was read."""


class PairingError(CkptdiffError):
    """Two checkpoints with nothing to compare."""


class PlanError(CkptdiffError):
    """Work that does not fit the memory it may use."""


class DeviceError(CkptdiffError):
    """A GPU that is missing, cannot be used, or failed."""


class ClusterError(CkptdiffError):
    """A Ray cluster that cannot be reached, does not fit the run, or failed."""


class MaskError(CkptdiffError):
    """Masks that do not fit a model, an optimizer or each other."""


class PatchError(CkptdiffError):
    """A patch that is damaged, or does not fit a checkpoint."""


class RunFileError(CkptdiffError):
    """A run file that cannot be read or written."""


def required(module: str, who_needs: str, extra: str) -> Any:
    """Import a module that an extra brings, or raise an OptionError that says how to get it.

    >>> required("no_such_module", "this needs", "spectra")
    Traceback (most recent call last):
    ckptdiff.errors.OptionError: this needs no_such_module, which is not installed
      try:      pip install 'ckptdiff[spectra]'
    """
    try:
        return import_module(module)
    except ImportError:
        problem = f"{who_needs} {module}, which is not installed"
        raise OptionError(problem, hint=f"pip install 'ckptdiff[{extra}]'") from None


def first_few(names: Iterable[str], most: int = 3, between: str = ", ") -> str:
    """Some of many names as a message lists them: "a, b, c, ..."; "" if there are none."""
    listed = list(names)
    return between.join([*listed[:most], *(["..."] if len(listed) > most else [])])


def plural(count: int, noun: str, many: str | None = None) -> str:
    """Spell "1 tensor", "2 tensors"; `many` is an irregular plural."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {many or noun + 's'}"
