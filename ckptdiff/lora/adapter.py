"""An adapter folder as PEFT reads it: adapter_config.json and adapter_model.safetensors.

Factors go to a file of their own as they come, since a safetensors file starts with the sizes of all of them; the
folder takes its name when it is complete.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.errors import OptionError

__all__ = ["AdapterWriter"]

_PREFIX = "base_model.model."
_COPY = 1 << 22


class AdapterWriter:
    """Writes an adapter: a context manager that leaves nothing behind unless :meth:`finish` was called.

    Parameters
    ----------
    folder : Path
        To be made.
    base : str
        Path of the base model, for the adapter's configuration.

    Raises
    ------
    OptionError
        If the folder exists or cannot be made.
    """

    def __init__(self, folder: Path, base: str) -> None:
        if folder.exists():
            raise OptionError(
                "the adapter's folder exists",
                file=folder,
                expected="a new folder",
                hint="remove it, or choose another -o",
            )
        if not folder.absolute().parent.is_dir():
            raise OptionError("the adapter's folder has no parent", file=folder, found=folder.absolute().parent)
        self._folder, self._base = folder, base
        self._staged = folder.with_name(f".{folder.name[:100]}.{secrets.token_hex(4)}.tmp")
        self._entries: dict[str, Any] = {}
        self._ranks: dict[str, int] = {}
        self._size = 0

    def __enter__(self) -> AdapterWriter:
        try:
            self._staged.mkdir()
        except OSError as error:
            raise OptionError(f"cannot make the adapter's folder: {error.strerror}", file=self._folder) from error
        self._data = (self._staged / "data").open("xb")
        return self

    def add(self, module: str, down: NDArray[np.float32], up: NDArray[np.float32]) -> None:
        """Add one linear layer.

        Parameters
        ----------
        module : str
            Its name: that of its weight without ``.weight``.
        down : float32 array, shape (rank, in)
            ``lora_A``.
        up : float32 array, shape (out, rank)
            ``lora_B``.
        """
        self._ranks[module] = len(down)
        for part, values in (("lora_A", down), ("lora_B", up)):
            self._data.write(np.ascontiguousarray(values, "<f4").data)
            stop = self._size + values.nbytes
            entry = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [self._size, stop]}
            self._entries[f"{_PREFIX}{module}.{part}.weight"] = entry
            self._size = stop

    def finish(self) -> None:
        """Write the header and the configuration, and give the folder its name."""
        self._data.close()
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._entries}).encode()
        header += b" " * (-len(header) % 8)
        with (self._staged / "adapter_model.safetensors").open("xb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            with (self._staged / "data").open("rb") as data:
                shutil.copyfileobj(data, out, _COPY)
            out.flush()
            os.fsync(out.fileno())
        (self._staged / "data").unlink()
        text = json.dumps(self._config(), indent=2)
        (self._staged / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
        self._staged.rename(self._folder)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._data.close()
        shutil.rmtree(self._staged, ignore_errors=True)

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
