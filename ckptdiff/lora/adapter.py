"""Write the files of an adapter as PEFT reads it: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.events import Stage
from ckptdiff.files.staged import StagedFile, write_whole
from ckptdiff.runfile.safetensors_file import Entry, write_safetensors

_PREFIX = "base_model.model."
_COPY = 1 << 22


class AdapterWriter:
    """Writes the files of an adapter of a base model into a folder.

    The spool, an empty file, takes the factors as they come, since a safetensors file begins with the sizes of all.
    """

    def __init__(self, folder: Path, base: str, spool: StagedFile) -> None:
        self._folder, self._base, self._spool = folder, base, spool
        self._entries: list[Entry] = []
        self._ranks: dict[str, int] = {}

    def add(self, module: str, down: NDArray[np.float32], up: NDArray[np.float32]) -> None:
        """Add one linear layer, whose weight is ``module.weight``.

        Its ``lora_A``, `down`, is float32 of shape (rank, in), its ``lora_B``, `up`, of shape (out, rank).
        """
        self._ranks[module] = len(down)
        for part, values in (("lora_A", down), ("lora_B", up)):
            pieces = partial(self._spooled, self._spool.tell(), values.nbytes)
            self._spool.write(np.ascontiguousarray(values, "<f4").data.cast("B"))
            self._spool.check()
            self._entries.append(Entry(f"{_PREFIX}{module}.{part}.weight", "F32", values.shape, pieces))

    def finish(self, told: Stage) -> None:
        """Write the files, and tell of each piece."""
        with StagedFile(self._folder / "adapter_model.safetensors") as staged:
            entries = [replace(entry, pieces=partial(self._told, entry, told)) for entry in self._entries]
            write_safetensors(staged, entries, {"format": "pt"})
            staged.commit()
        text = json.dumps(self._config(), indent=2) + "\n"
        write_whole(self._folder / "adapter_config.json", text.encode())

    def _spooled(self, start: int, size: int) -> Iterator[bytes]:
        for offset in range(0, size, _COPY):
            self._spool.seek(start + offset)
            yield self._spool.read(min(_COPY, size - offset))

    def _told(self, entry: Entry, told: Stage) -> Iterator[bytes]:
        for piece in entry.pieces():
            yield piece
            told.more(len(piece), entry.name)

    def _config(self) -> dict[str, Any]:
        """With alpha equal to the rank everywhere, so that the factors are not scaled."""
        most = max(self._ranks.values(), default=1)
        other = {module: rank for module, rank in self._ranks.items() if rank != most}
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": self._base,
            "task_type": None,
            "inference_mode": True,
            "r": most,
            "lora_alpha": most,
            "rank_pattern": other,
            "alpha_pattern": other,
            "target_modules": list(self._ranks),
            "bias": "none",
            "fan_in_fan_out": False,
            "lora_dropout": 0.0,
        }
