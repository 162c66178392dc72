"""Write safetensors files piece by piece."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    header: dict[str, Any] = {METADATA: metadata}
    stop = 0
    for entry in entries:
        start, stop = stop, stop + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, stop]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    staged.write(len(text).to_bytes(8, "little") + text)
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


def is_safetensors_of(path: Path, format: str) -> bool:
    """Whether a file is one that :func:`write_safetensors` wrote with metadata that begin with this format."""
    with path.open("rb") as file:
        return file.read(256)[8:].startswith(f'{{"{METADATA}":{{"format":"{format}"'.encode())
