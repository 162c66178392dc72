"""Read what a checkpoint's configuration says of its quantised weights; what its tensors are is told by themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ckptdiff.checkpoint.checkpoint import Checkpoint
from ckptdiff.checkpoint.model_config import read_config

__all__ = ["Quantization", "Scheme", "read_quantization"]

_DEFAULT_BLOCK = (128, 128)
_KEYS = ("quantization_config", "compression_config")
_ODD = "what it says of quantisation is not understood"

_ALGORITHMS: dict[str, tuple[int, bool, tuple[int, int] | None]] = {
    "FP8": (8, True, None),
    "FP8_PER_CHANNEL_PER_TOKEN": (8, True, None),
    "FP8_PB_WO": (8, True, _DEFAULT_BLOCK),
    "FP8_PB_REAL": (8, True, _DEFAULT_BLOCK),
    "NVFP4": (4, True, (1, 16)),
    "NVFP4_AWQ": (4, True, (1, 16)),
    "W4A16_NVFP4": (4, True, (1, 16)),
    "MXFP8": (8, True, (1, 32)),
    "MXFP4": (4, True, (1, 32)),
}
"""Bits, whether codes are floating, and block of ModelOpt's algorithms."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How some weights are quantised.

    Attributes
    ----------
    bits : int
    floats : bool
        Whether codes are floating ones, not integers.
    block : tuple of (int, int) or None
        Rows and columns that share a scale. None if there is one for a row or for all.
    targets : tuple of str
        Names of modules, "re:" and a regular expression for them, or classes of modules, which names do not tell.
    """

    bits: int
    floats: bool
    block: tuple[int, int] | None
    targets: tuple[str, ...] = ()

    def names(self, module: str) -> bool:
        """Whether a target is this module by its name."""
        return any(
            _matches(target[3:], module) if target.startswith("re:") else target == module for target in self.targets
        )


@dataclass(frozen=True, slots=True)
class Quantization:
    """What is said of a checkpoint's weights.

    Attributes
    ----------
    path : str
        The file that says so.
    method : str
        "compressed-tensors", "modelopt", "fp8", ...; "" if nothing is said.
    schemes : tuple of Scheme
        Empty if nothing is said that is understood.
    rotated : bool
        Whether weights are stored rotated, so that the model multiplies with others.
    warnings : tuple of str
    """

    path: str
    method: str
    schemes: tuple[Scheme, ...]
    rotated: bool
    warnings: tuple[str, ...]

    @property
    def known(self) -> bool:
        """Whether the method is one whose words are understood, if one is named."""
        return self.method in ("", "fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors", "modelopt")

    @property
    def binding(self) -> bool:
        """Whether the schemes are of all weights; DeepSeek's experts have another one than its configuration names."""
        return self.method in ("compressed-tensors", "modelopt")

    def schemes_of(self, module: str) -> tuple[Scheme, ...]:
        """The schemes that may be those of a module: those that name it, or those for classes of modules."""
        named = tuple(scheme for scheme in self.schemes if scheme.names(module))
        return named or tuple(scheme for scheme in self.schemes if any(map(_is_class, scheme.targets or ("*",))))


def read_quantization(checkpoint: Checkpoint) -> Quantization:
    """Read ``quantization_config`` of ``config.json``, or else ModelOpt's ``hf_quant_config.json``.

    What cannot be read, or makes no sense, is a warning.
    """
    config = read_config(checkpoint)
    path, warnings = config.path, [config.warning]
    parts = (config.values, config.values.get("text_config"))
    said = [part.get(key) for part in parts if isinstance(part, dict) for key in _KEYS]
    given = next((value for value in said if value is not None), None)
    method = given.get("quant_method") if isinstance(given, dict) else None
    if given is None:
        own = read_config(checkpoint, "hf_quant_config.json")
        warnings.append(own.warning)
        path, given, method = own.path, own.values.get("quantization"), "modelopt"
    if given is None:
        return Quantization(path, "", (), False, tuple(filter(None, warnings)))
    if not isinstance(given, dict) or not isinstance(method, str):
        return Quantization(path, "", (), False, (*filter(None, warnings), f"{path}: {_ODD}"))
    try:
        schemes = tuple(_schemes(method, given))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        warnings.append(f"{path}: {_ODD}: {error}")
        schemes = ()
    transforms = given.get("transform_config")
    rotated = isinstance(transforms, dict) and bool(transforms.get("config_groups"))
    return Quantization(path, method, schemes, rotated, tuple(filter(None, warnings)))


def _schemes(method: str, given: dict[str, Any]) -> Iterator[Scheme]:
    """What each method says, in its own words."""
    if method == "fp8":
        block = given.get("weight_block_size", _DEFAULT_BLOCK)
        yield Scheme(8, True, None if block is None else _block(block))
    elif method == "fbgemm_fp8":  # a scale for each row
        yield Scheme(8, True, None)
    elif method == "mxfp4":
        yield Scheme(4, True, (1, 32))
    elif method in ("compressed-tensors", "modelopt"):
        groups = given.get("config_groups") or {}
        for group in groups.values():
            yield from _group(group)
        if groups:
            return
        algorithm = given.get("quant_algo")
        if algorithm in _ALGORITHMS:
            yield Scheme(*_ALGORITHMS[algorithm])
        for module, one in (given.get("quantized_layers") or {}).items():
            if one.get("quant_algo") in _ALGORITHMS:
                yield Scheme(*_ALGORITHMS[one["quant_algo"]], (module,))


def _group(group: dict[str, Any]) -> Iterator[Scheme]:
    weights, targets = group.get("weights"), tuple(str(target) for target in group.get("targets") or ())
    if weights is None:
        return
    bits, kind, strategy = weights.get("num_bits", 8), weights.get("type", "int"), weights.get("strategy")
    if type(bits) is not int or kind not in ("int", "float"):
        raise ValueError(f"num_bits {bits!r} of type {kind!r}")
    block = weights.get("block_structure")
    if isinstance(block, str):
        block = [int(size) for size in block.split("x")]
    size = weights.get("group_size")
    if block is None and size is not None and size != -1 and strategy in (None, "group", "tensor_group"):
        block = (1, size)
    yield Scheme(bits, kind == "float", None if block is None else _block(block), targets)


def _block(value: Any) -> tuple[int, int]:
    rows, columns = value
    if not all(type(size) is int and size > 0 for size in (rows, columns)):
        raise ValueError(f"blocks of {value!r}")
    return rows, columns


def _is_class(target: str) -> bool:
    return not target.startswith("re:") and "." not in target


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error:
        return False
