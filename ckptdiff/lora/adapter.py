"""Write the files of an adapter as PEFT reads it: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.events import Stage
from ckptdiff.exports.adaptable import Way
from ckptdiff.files.staged import StagedFile, write_whole
from ckptdiff.runfile.safetensors_file import Entry, write_safetensors

_PREFIX = "base_model.model."
_COPY = 1 << 22
_EXPERTS: tuple[Way, ...] = ("expert", "fused")
_Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Factors:
    """Of one module or parameter, in the spool."""

    way: Way
    rank: int
    shapes: tuple[tuple[int, int], tuple[int, int]]
    """Of ``lora_A`` and ``lora_B``."""
    starts: tuple[int, int]


class AdapterWriter:
    """Writes the files of an adapter of a base model into a folder.

    The spool, an empty file, takes the factors as they come, since a safetensors file begins with the sizes of all.
    """

    def __init__(self, folder: Path, base: str, spool: StagedFile) -> None:
        self._folder, self._base, self._spool = folder, base, spool
        self._held: dict[str, _Factors] = {}

    def add(self, module: str, way: Way, rank: int, down: _Floats, up: _Floats) -> None:
        """Add what is called `module`, or is a parameter of that name.

        Its ``lora_A``, `down`, is float32 of shape (rank, in), its ``lora_B``, `up`, of shape (out, rank); in a stack
        of experts, (experts * rank, in) and (out, rank * experts).
        """
        starts = []
        for values in (down, up):
            starts.append(self._spool.tell())
            self._spool.write(np.ascontiguousarray(values, "<f4").data.cast("B"))
            self._spool.check()
        shapes = (down.shape[0], down.shape[1]), (up.shape[0], up.shape[1])
        self._held[module] = _Factors(way, rank, shapes, (starts[0], starts[1]))

    def finish(self, experts: Mapping[str, tuple[int, ...]], told: Stage) -> None:
        """Write the files, and tell of each piece.

        PEFT stacks the factors of experts: all of a layer, and of one rank. Of `experts`, which names those of the
        model with their shapes, those are added with zeros that are in a layer with others.
        """
        common = self._common
        entries: list[Entry] = []
        for module, factors in self._held.items():
            stem = f"{_PREFIX}{self._stem(module, factors.way)}"
            more = common - factors.rank if factors.way in _EXPERTS else 0
            for part, shape, start in zip(("lora_A", "lora_B"), factors.shapes, factors.starts, strict=True):
                rows = (more, 0) if part == "lora_A" else (0, more)
                pieces = partial(self._padded, start, shape, rows) if more else partial(self._spooled, start, shape)
                padded = shape[0] + rows[0], shape[1] + rows[1]
                entries.append(Entry(f"{stem}.{part}.weight", "F32", padded, pieces))
        lacking = self._lacking(experts)
        for module, (outputs, inputs) in lacking.items():
            for part, down, across in (("lora_A", common, inputs), ("lora_B", outputs, common)):
                zeros = partial(_zeros, 4 * down * across)
                entries.append(Entry(f"{_PREFIX}{module}.{part}.weight", "F32", (down, across), zeros))
        with StagedFile(self._folder / "adapter_model.safetensors") as staged:
            followed = [replace(entry, pieces=partial(_followed, entry, told)) for entry in entries]
            write_safetensors(staged, followed, {"format": "pt"})
            staged.commit()
        text = json.dumps(self._config(lacking), indent=2) + "\n"
        write_whole(self._folder / "adapter_config.json", text.encode())

    @property
    def _common(self) -> int:
        """The rank of all experts."""
        return max((factors.rank for factors in self._held.values() if factors.way in _EXPERTS), default=0)

    def _stem(self, name: str, way: Way) -> str:
        """What the factors of a module or of a parameter are called: PEFT wraps a module once for each parameter."""
        if way not in ("parameter", "stack"):
            return name
        module, _, parameter = name.rpartition(".")
        wrapped_again = parameter == "gate_up_proj" and f"{module}.down_proj" in self._held
        return f"{module}.base_layer" if wrapped_again else module

    def _lacking(self, experts: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        layers = {*self._layers_with(*_EXPERTS)}
        return {m: shape for m, shape in experts.items() if m not in self._held and _layer_of(m) in layers}

    def _layers_with(self, *ways: Way) -> list[str]:
        """Where there are factors of experts."""
        return list(dict.fromkeys(_layer_of(module) for module, factors in self._held.items() if factors.way in ways))

    def _spooled(self, start: int, shape: tuple[int, int]) -> Iterator[bytes]:
        size = 4 * shape[0] * shape[1]
        for offset in range(0, size, _COPY):
            self._spool.seek(start + offset)
            yield self._spool.read(min(_COPY, size - offset))

    def _padded(self, start: int, shape: tuple[int, int], more: tuple[int, int]) -> Iterator[bytes]:
        values = np.frombuffer(b"".join(self._spooled(start, shape)), "<f4").reshape(shape)
        yield np.pad(values, ((0, more[0]), (0, more[1]))).tobytes()

    def _config(self, lacking: Iterable[str]) -> dict[str, Any]:
        """With alpha equal to the rank everywhere, so that the factors are not scaled."""
        common = self._common
        ranks = {m: common if f.way in _EXPERTS else f.rank for m, f in self._held.items()}
        # What PEFT stacks has the rank that no pattern changes.
        most = common or max(ranks.values(), default=1)
        ways = {module: factors.way for module, factors in self._held.items()}
        other = {self._pattern(m, ways[m]): rank for m, rank in ranks.items() if rank != most}
        parameters = [m for m, way in ways.items() if way in ("parameter", "stack")]
        for layer in self._layers_with("fused"):
            parameters += [f"{layer}.experts.gate_up_proj", f"{layer}.experts.down_proj"]
            other[f"{layer}.experts.gate_up_proj"] = 2 * common  # a half for each part
        modules = [m for m, way in ways.items() if way not in ("parameter", "stack", "fused")]
        if "fused" not in ways.values():
            modules += lacking
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "base_model_name_or_path": self._base,
            "task_type": None,
            "inference_mode": True,
            "r": most,
            "lora_alpha": most,
            "rank_pattern": other,
            "alpha_pattern": other,
            "target_modules": modules,
            "bias": "none",
            "fan_in_fan_out": bool(ways) and all(way == "conv1d" for way in ways.values()),
            "lora_dropout": 0.0,
        }
        return {**config, "target_parameters": parameters} if parameters else config

    def _pattern(self, module: str, way: Way) -> str:
        """By what PEFT finds the rank; a router beside experts becomes a parameter, in a module that it may rename."""
        if way != "router":
            return module
        layer = module.rpartition(".")[0].rpartition(".")[0]
        return rf"{re.escape(layer)}\.[^.]+\.gate\.weight"


def _layer_of(module: str) -> str:
    """What is before the experts in the name of one."""
    return module.partition(".experts.")[0]


def _zeros(size: int) -> Iterator[bytes]:
    for offset in range(0, size, _COPY):
        yield bytes(min(_COPY, size - offset))


def _followed(entry: Entry, told: Stage) -> Iterator[bytes]:
    for piece in entry.pieces():
        yield piece
        told.more(len(piece), entry.name)


def stacked(parts: list[tuple[_Floats, _Floats] | None], rows: int, columns: int, in_out: bool) -> tuple[
    int, _Floats, _Floats
]:  # fmt: skip
    """Put the factors of the experts of one parameter together as PEFT has them.

    Parameters
    ----------
    parts : list of (down, up) or None
        Of each expert's matrix of shape (rows, columns), which is ``up @ down``; None where it did not change.
    rows, columns : int
    in_out : bool
        Whether rows are inputs.

    Returns
    -------
    rank : int
        Of each expert, the largest that one has.
    down : float32 array, shape (experts * rank, inputs)
    up : float32 array, shape (outputs, rank * experts)
    """
    rank = max(len(part[0]) for part in parts if part is not None)
    inputs, outputs = (rows, columns) if in_out else (columns, rows)
    down, up = np.zeros((len(parts), rank, inputs), np.float32), np.zeros((outputs, rank, len(parts)), np.float32)
    for expert, part in enumerate(parts):
        if part is not None:
            ours, theirs = (part[1].T, part[0].T) if in_out else part
            down[expert, : len(ours)] = ours
            up[:, : len(ours), expert] = theirs
    return rank, down.reshape(-1, inputs), up.reshape(outputs, -1)
