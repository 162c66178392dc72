"""Make the directory of zstd frames that slime, miles, vime and stitch write, and SGLang's ``/pull_weights`` applies.

It is one version of the weights: safetensors files that hold, of each tensor that changed, one zstd frame of type U8,
and in their metadata the digest of its new bytes; and ``model.safetensors.index.json``, which is written last. A frame
holds the new bytes xor the old ones, or how many bytes changed, where (both uint32), and what they are now.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from ckptdiff.checkpoint import Checkpoint
from ckptdiff.checkpoint.checkpoint import open_pair
from ckptdiff.errors import OptionError, PatchError
from ckptdiff.events import Listener
from ckptdiff.files.staged import StagedFolder
from ckptdiff.patch.comparing import Shipped, Sides, make_of_pair, require_same_tensors
from ckptdiff.patch.digests import CHECKSUMS, digest_of, required
from ckptdiff.patch.directory_making import DirectoryMaking
from ckptdiff.runfile.check_target import check_new

__all__ = ["ENCODINGS", "OVERWRITE_LIMIT", "begin_directory", "folder_name", "make_directory"]

ENCODINGS = ("xor", "overwrite")
OVERWRITE_LIMIT = 1 << 32
"""Bytes of a tensor from which uint32 positions do not reach its end."""
_VERSIONED = re.compile(r"weight_v(\d{6,})")
_MOST_VERSION = 999_999_999


def folder_name(version: int) -> str:
    """What engines look for."""
    return f"weight_v{version:06d}"


def make_directory(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    encoding: str = "xor",
    checksum: str = CHECKSUMS[0],
    version: int | None = None,
    base_version: int | None = None,
    level: int = 1,
    threads: int = 0,
    listener: Listener | None = None,
) -> Shipped:
    """Write what makes `tuned` of `base` as a directory that inference engines pull.

    Parameters
    ----------
    base, tuned : path-like
        Checkpoints with the same tensors, as `open_checkpoint` takes them.
    target : path-like
        The version's directory, to be made.
    encoding : {"xor", "overwrite"}
        The first is its own inverse; the second may be applied again.
    checksum : {"xxh3-128", "blake3", "adler32"}
        Of the bytes of each changed tensor.
    version, base_version : int, optional
        Which version it makes, and of which one. Without the first it is the number in a target named like
        ``weight_v000001``, or 1; without the second it is the one before.
    level : int
        Of zstd, from 1 to 19; above, each thread would keep hundreds of megabytes.
    threads : int
        0 stands for one per core. The result does not depend on it.
    listener : callable, optional
        Told of the stage "making the patch", in bytes.

    Returns
    -------
    Shipped

    Raises
    ------
    CheckpointError
        A side cannot be read, or changes while it is read.
    OptionError
        A module is missing, or an option makes no sense.
    PatchError
        A tensor is new, lost, retyped or reshaped, or too large for `overwrite`.
    RunFileError
        The target exists or cannot be written.

    Examples
    --------
    >>> base, tuned = "fixtures/llama/base", "fixtures/llama/tuned"
    >>> from ckptdiff import patch
    >>> made = patch.make_directory(base, tuned, "weight_v000001")
    >>> made.changed_tensors, made.files
    (30, 3)
    """
    target = Path(target)
    sides = open_pair(os.fspath(base), os.fspath(tuned))
    check_new(target)
    begin = partial(
        begin_directory,
        sides,
        target,
        encoding=encoding,
        checksum=checksum,
        version=version,
        base_version=base_version,
        level=level,
    )
    return make_of_pair(sides, begin, threads, listener)


@contextmanager
def begin_directory(
    sides: Sides,
    target: Path,
    stop: threading.Event,
    threads: int,
    *,
    encoding: str = "xor",
    checksum: str = CHECKSUMS[0],
    version: int | None = None,
    base_version: int | None = None,
    level: int = 1,
) -> Iterator[DirectoryMaking]:
    """Begin a directory of two sides, which :func:`~ckptdiff.patch.comparing.make_of_pair` goes on with.

    Parameters and errors as of :func:`make_directory`.
    """
    versions = _versions(target, version, base_version)
    for name, value, known in (("encoding", encoding, ENCODINGS), ("checksum", checksum, CHECKSUMS)):
        if value not in known:
            raise OptionError(f"no such {name}", expected=", ".join(known), found=value)
    if not 1 <= level <= 19:
        raise OptionError("zstd is used with no such level", expected="1 to 19", found=level)
    digest_of(b"", checksum)  # asks for its module
    zstandard = required("zstandard")
    require_same_tensors(sides, "a directory of deltas")
    if encoding == "overwrite":
        _require_reach(sides[1])
    facts = {
        "version": f"{versions[0]:06d}",
        "base_version": f"{versions[1]:06d}",
        "delta_encoding": encoding,
        "compression_format": "zstd",
        "checksum_format": checksum,
    }
    with StagedFolder(target) as folder, ExitStack() as stack:
        # Frames of large tensors are cut into jobs, whose bounds, and so the bytes, are the same with any number of
        # threads but none.
        parallel = zstandard.ZstdCompressor(level=level, threads=threads)
        small = partial(zstandard.ZstdCompressor, level=level)
        yield DirectoryMaking(sides, facts, parallel, small, folder, stack, stop)


def _versions(target: Path, version: int | None, base_version: int | None) -> tuple[int, int]:
    named = _VERSIONED.fullmatch(target.name)
    if version is None:
        version = int(named[1]) if named else 1
    if base_version is None:
        base_version = version - 1
    if not 0 <= base_version < version <= _MOST_VERSION:
        raise OptionError(
            "a version follows the one it is made of",
            expected=f"0 <= base version < version <= {_MOST_VERSION}",
            found=f"version {version} of version {base_version}",
        )
    return version, base_version


def _require_reach(side: Checkpoint) -> None:
    for name, tensor in side.tensors.items():
        if tensor.nbytes >= OVERWRITE_LIMIT:
            raise PatchError(
                "overwrite has 32-bit positions, which do not reach the end of this tensor",
                file=side.path,
                tensor=name,
                expected=f"fewer than {OVERWRITE_LIMIT} bytes",
                found=tensor.nbytes,
                hint="--encoding xor",
            )
