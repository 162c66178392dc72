"""Say what the work of a run depends on, so that a later command may go on with what was kept of it."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

import ckptdiff
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.errors import plural
from ckptdiff.events import Listener, Note
from ckptdiff.figures.result import SIDES, Diff
from ckptdiff.files.unfinished import Saving, Unfinished, folder_of, is_unfinished
from ckptdiff.kernel_library import kernels_in_use, library, processor_flags
from ckptdiff.options import SpectraOptions

_LIBRARIES = "numpy", "numba", "scipy", "cupy-cuda12x", "cupy-cuda13x"
"""Of another version they may give other digits."""
_OPTIONS = {"values": "--values", "renames": "--map", "include": "--include", "exclude": "--exclude"}
_PAIRED = attrgetter(
    "name",
    "shape",
    "dtype_base",
    "dtype_tuned",
    "compare",
    "tuned_name",
    "same_bytes",
    "unread",
    "pieces",
    "rows",
    "untied",
)
"""What of a tensor pair is measured; groups are only reported."""


def _processor() -> str:
    """What the kernels run on, or are compiled for where that is done on the spot."""
    if library() is None:
        from ckptdiff.kernel_cache import processor_name

        return processor_name()
    return f"{platform.machine()}, {_digest(' '.join(sorted(processor_flags())))}"


def belonging(command: str, diff: Diff, device: str, spectra: SpectraOptions | None) -> dict[str, str]:
    """What figures and masks of a run depend on, in words.

    Files are told by their headers, sizes, times of modification and ETags, not by their names. Threads, memory and
    ways to read are left out: no digit depends on them. A `diff` with columns stands for a run file, whose figures
    count.
    """
    found = {
        "command": command,
        "version": f"{ckptdiff.__version__}, {hash_of_code()}",
        "libraries": ", ".join(f"{name} {one}" for name in _LIBRARIES if (one := _version(name))),
        "processor": f"{_processor()}, {kernels_in_use()}",
        "--device": device,
        "--compare": diff.compare,
        "--mask": diff.mask_rule,
        "--quick": "yes" if diff.options.get("quick") else "",
        "--spectra": ", ".join(f"{key} {value}" for key, value in asdict(spectra).items()) if spectra else "",
    }
    found |= {option: " ".join(map(repr, _several(diff.options.get(name)))) for name, option in _OPTIONS.items()}
    for side, facts in zip(SIDES, (diff.base, diff.tuned), strict=True):
        known = ("header_sha256", "size", "mtime_ns", "etag")
        shards = [tuple(shard.get(name) for name in known) for shard in facts["shards"]]
        found[side] = f"{plural(len(shards), 'file')}, {_digest(repr(shards))}"
    columns = "".join(f"{name}{_digest(diff.columns[name].tobytes())}" for name in sorted(diff.columns))
    found["tensors"] = f"{len(diff.tensors):,}, {_digest(repr(list(map(_PAIRED, diff.tensors))) + columns)}"
    return found


def resumable(
    target: Path,
    belongs: Callable[[], Mapping[str, str]],
    shards: OpenShards,
    tell: Listener,
    saving: Saving | None,
) -> AbstractContextManager[Unfinished | None]:
    """Keep what is done beside its output, and hand out what an earlier command kept.

    What was read of shards that change meanwhile is not kept. Without `saving` nothing is, and a note says if something
    was.
    """
    if saving is not None:
        return Unfinished(target, belongs(), lambda text: tell(Note(text, warning=True)), saving, shards.check)
    if is_unfinished(target):
        text = f"{folder_of(target)} holds what an unfinished run has done: --resume goes on from there"
        tell(Note(text, warning=True))
    return nullcontext()


def hash_of_code() -> str:
    """Hash of the package itself: a version in the making has the number of the one before."""
    digest = hashlib.blake2b(digest_size=8)
    package = Path(ckptdiff.__file__).parent
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".cu", ".cuh")):
        digest.update(os.fsencode(path.relative_to(package)) + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _version(library: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def _digest(data: str | bytes) -> str:
    found = data.encode(errors="surrogatepass") if isinstance(data, str) else data
    return hashlib.blake2b(found, digest_size=8).hexdigest()


def _several(given: Any) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())
