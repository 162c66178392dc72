"""Write safetensors files piece by piece."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring as quoted
from pathlib import Path

from ckptdiff.checkpoint import DTYPES
from ckptdiff.errors import RunFileError
from ckptdiff.files.staged import StagedFile

METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to be written."""

    name: str
    dtype: str
    """As the header spells it."""
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[bytes]]
    """Returns its bytes in order, little-endian; called once."""

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return math.prod(self.shape) * DTYPES[self.dtype].bits // 8


def write_safetensors(staged: StagedFile, entries: Sequence[Entry], metadata: dict[str, str]) -> None:
    """Write a whole file, wide elements first, since the format wants every tensor aligned.

    Raises RunFileError if a write failed, or an entry's pieces are not as long as its shape says.
    """
    entries = sorted(entries, key=lambda entry: -DTYPES[entry.dtype].bits)
    staged.write(header_bytes(((one.name, one.dtype, one.shape, one.nbytes) for one in entries), metadata))
    for entry in entries:
        written = 0
        for data in entry.pieces():
            written += staged.write(data)
            staged.check()
        if written != entry.nbytes:
            raise RunFileError(
                "a mask does not hold as many coordinates as the table says",
                tensor=entry.name,
                expected=f"{entry.nbytes} bytes",
                found=f"{written} bytes",
                hint="run ckptdiff diff again",
            )


def header_bytes(tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: dict[str, str]) -> bytes:
    """The header of a file, and the length before it.

    Parameters
    ----------
    tensors : iterable of (str, str, sequence of int, int)
        Name, dtype, shape and bytes of each, in the order in which they follow.
    metadata : dict of str to str
    """
    parts, stop = [f'"{METADATA}":{json.dumps(metadata, ensure_ascii=False, separators=(",", ":"))}'], 0
    for name, dtype, shape, nbytes in tensors:
        start, stop = stop, stop + nbytes
        sizes = ",".join(map(str, shape))
        parts.append(f'{quoted(name)}:{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":[{start},{stop}]}}')
    text = f"{{{','.join(parts)}}}".encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def is_safetensors_of(path: Path, format: str) -> bool:
    """Whether a file is one that :func:`write_safetensors` wrote with metadata that begin with this format."""
    with path.open("rb") as file:
        return file.read(256)[8:].startswith(f'{{"{METADATA}":{{"format":"{format}"'.encode())
