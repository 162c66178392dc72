"""Find quantised weights: codes with their scales, told apart by names, dtypes and shapes of siblings.

``code_layouts.py`` has a row for each layout. What ``config.json`` says is held against it: where they disagree, or a
scale is missing or does not fit, a tensor stays the codes that are stored.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptdiff.checkpoint.checkpoint import Checkpoint
from ckptdiff.checkpoint.code_formats import CODES
from ckptdiff.checkpoint.code_layouts import BESIDE, FP8, LAYOUTS, CodeLayout
from ckptdiff.checkpoint.header import TensorInfo
from ckptdiff.checkpoint.quantization_config import Quantization, Scheme, read_quantization
from ckptdiff.checkpoint.regular_file import open_regular, read_bytes
from ckptdiff.checkpoint.scale_grids import OddScaleError, block_of, grid_of
from ckptdiff.checkpoint.weights import Decoded, Weight

__all__ = ["MAY_BE_CODES", "Encoded", "find_encoded", "is_packed", "is_scaled", "scaled_modules"]

_INTEGERS = ("U8", "I8", "I32")
MAY_BE_CODES = frozenset({*_INTEGERS, *FP8})
"""Dtypes of codes that scales may belong to."""
_ENDINGS = ("_packed", "_blocks")
_MEANINGFUL = (*BESIDE, "_scales", "_scale_2", "_global_scale", "_zero_point", "_g_idx")
"""Siblings that say what codes are worth. A row that does not know one of them does not fit."""
_SHAPE = "_shape"
_BYTES_OF_GROUP = 16
"""The last axis of blocks."""
_MOST_AXES = 8
_NO_CODES = ("scale", "zero", "shape", "idx")
"""Words in the names of what lies beside codes."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The quantised weights of a checkpoint.

    Attributes
    ----------
    weights : mapping of str to Decoded
        By their names, in the order of their codes.
    parts : frozenset of str
        Names of the stored tensors that they are made of: codes, scales, zero points, shapes.
    warnings : tuple of str
        Codes that stay codes, and why; and weights that the model changes before it multiplies with them.
    """

    weights: Mapping[str, Decoded]
    parts: frozenset[str]
    warnings: tuple[str, ...]


def find_encoded(checkpoint: Checkpoint) -> Encoded:
    """Find the quantised weights of a checkpoint.

    Besides headers and configuration only the stored shapes of packed integers are read.

    Parameters
    ----------
    checkpoint : Checkpoint

    Returns
    -------
    Encoded
        What cannot be decoded for certain is no part of it: its warning names file and tensor.

    Raises
    ------
    CheckpointError
        A shard that cannot be read.
    """
    tensors = checkpoint.tensors
    suspects = [tensor for tensor in tensors.values() if tensor.dtype in MAY_BE_CODES]
    candidates = [found for tensor in suspects if (found := _candidate(tensor, tensors)) is not None]
    if not candidates:
        return Encoded({}, frozenset(), ())
    config = read_quantization(checkpoint)
    shapes = _stored_shapes(found.siblings[_SHAPE] for found in candidates if _SHAPE in found.siblings)
    weights: dict[str, Decoded] = {}
    problems: dict[str, list[TensorInfo]] = defaultdict(list)
    bare: list[_Candidate] = []
    for found in candidates:
        if not any(name in found.siblings for name in _MEANINGFUL):
            bare.append(found)
            continue
        try:
            if found.ending and found.name in tensors:
                raise OddScaleError("the weight itself is stored beside it")
            weights[found.name] = _decoded(found, config, shapes)
        except OddScaleError as problem:
            problems[str(problem)].append(found.codes)
    for name in _unlike_siblings(weights):
        problems["its scales are not as those of its siblings"].append(weights.pop(name).codes)
    patterns = {_pattern(name) for name in weights}
    for found in bare:
        if _pattern(found.name) in patterns:
            problems["it has no scale, unlike its siblings"].append(found.codes)
    warnings = [f"{_first(some)}: {problem}: compared as stored codes" for problem, some in problems.items()]
    if weights and not config.known:
        known = f"quant_method {config.method!a} is not known: weights are decoded by what their tensors tell alone"
        warnings.append(f"{config.path}: {known}")
    warnings += _altered(weights, tensors, config)
    parts = frozenset(part.name for weight in weights.values() for part in weight.parts)
    return Encoded(weights, parts, (*config.warnings, *warnings))


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Codes, as far as their dtype and name tell."""

    name: str
    """Of the weight."""
    ending: str
    codes: TensorInfo
    siblings: dict[str, TensorInfo]
    """By what their names have beyond the weight's."""


def _candidate(codes: TensorInfo, tensors: Mapping[str, TensorInfo]) -> _Candidate | None:
    if not codes.numel or not codes.shape:
        return None
    ending = next((ending for ending in _ENDINGS if codes.name.endswith(ending)), "")
    if codes.dtype == "I32" and not ending:
        return None
    name = codes.name.removesuffix(ending)
    names = {key: name + key for key in (*_MEANINGFUL, _SHAPE) if key != ".scale"}
    if name.endswith(".weight"):
        names[".scale"] = name.removesuffix("weight") + "scale"
    return _Candidate(name, ending, codes, {key: tensors[held] for key, held in names.items() if held in tensors})


def _decoded(found: _Candidate, config: Quantization, shapes: Mapping[str, tuple[int, ...]]) -> Decoded:
    """The weight of a candidate, by the first row that fits; raises why the last one that nearly did does not."""
    problem = OddScaleError(
        f"{found.codes.dtype} with {', '.join(name.lstrip('._') for name in _MEANINGFUL if name in found.siblings)}"
        " is no format that is known"
    )
    lacking: OddScaleError | None = None
    for layout in LAYOUTS:
        scales = _scales(layout, found, config)
        if scales is None:
            continue
        if scales.dtype not in layout.scale_dtypes:
            problem = OddScaleError(
                f"{_last(scales)} is {scales.dtype}, not {' or '.join(sorted(layout.scale_dtypes))}"
            )
            continue
        if layout.global_scale is not None and layout.global_scale not in found.siblings:
            lacking = lacking or OddScaleError(f"it has no {found.name.rpartition('.')[2]}{layout.global_scale}")
            continue
        try:
            return _by_layout(layout, found, scales, config, shapes)
        except OddScaleError as error:
            problem = error
    raise lacking or problem


def _scales(layout: CodeLayout, found: _Candidate, config: Quantization) -> TensorInfo | None:
    """The scales, if a row has the names and dtype of a candidate, no more and, but for the global scale, no less."""
    known = {layout.global_scale, *(["_zero_point"] if layout.zeros else [])}
    beside = [name for name in _MEANINGFUL if name in found.siblings and name not in known]
    fits = (
        layout.codes == found.ending
        and found.codes.dtype in layout.dtypes
        and len(beside) == 1
        and beside[0] in layout.scales
        and layout.method in (None, config.method)
    )
    return found.siblings[beside[0]] if fits else None


def _by_layout(
    layout: CodeLayout,
    found: _Candidate,
    scales: TensorInfo,
    config: Quantization,
    shapes: Mapping[str, tuple[int, ...]],
) -> Decoded:
    codes, schemes = found.codes, config.schemes_of(found.name.removesuffix(".weight"))
    stored = found.siblings.get(_SHAPE) if codes.dtype == "I32" else None
    if codes.dtype == "I32":
        shape, bits = _unpacked(codes, scales, schemes, None if stored is None else shapes[stored.name])
        code = f"int{bits}"
    else:
        code = layout.code or FP8[codes.dtype]
        shape = _shape(layout, codes)
    bits, floats = CODES[code].bits, CODES[code].floats
    alike = [scheme for scheme in schemes if (scheme.bits, scheme.floats) == (bits, floats)]
    if config.binding and schemes and not alike:
        raise OddScaleError(f"it holds {code} codes, and {config.path} speaks of other formats")
    said = [scheme.block for scheme in alike]
    if layout.group is None:
        block = block_of(shape, scales, said, config.path)
    else:
        block = block_of(shape, scales, [(1, layout.group)], layout.encoding)
        if config.binding and said and block not in said:
            raise OddScaleError(f"its groups are of {layout.group}, and {config.path} speaks of others")
    zeros = found.siblings.get("_zero_point")
    factor = None if layout.global_scale is None else found.siblings[layout.global_scale]
    if zeros is not None:
        _check_zeros(zeros, scales, grid_of(shape, block), bits)
    if factor is not None and (factor.dtype != "F32" or factor.numel not in (1, math.prod(shape[:-2]))):
        raise OddScaleError(f"{_last(factor)} is {factor.dtype} of shape {list(factor.shape)}, not one F32")
    parts = (codes, scales, *(part for part in (zeros, factor, stored) if part is not None))
    encoding = layout.encoding if floats else code.upper()
    return Decoded(
        found.name, encoding, shape, codes, parts, code, scales, block, zeros, factor, divides=layout.divides
    )


def _shape(layout: CodeLayout, codes: TensorInfo) -> tuple[int, ...]:
    """Of the values of codes of 4 or 8 bits."""
    if layout.codes == "_blocks":
        if len(codes.shape) < 2 or codes.shape[-1] != _BYTES_OF_GROUP:
            raise OddScaleError(f"its shape is {list(codes.shape)}, not groups of {_BYTES_OF_GROUP} bytes")
        return (*codes.shape[:-2], codes.shape[-2] * 2 * _BYTES_OF_GROUP)
    return (*codes.shape[:-1], codes.shape[-1] * (2 if layout.code == "e2m1" else 1))


def _unpacked(
    codes: TensorInfo, scales: TensorInfo, schemes: Iterable[Scheme], stored: tuple[int, ...] | None
) -> tuple[tuple[int, ...], int]:
    """Shape and bits of packed integers: those that make as many words of a row as there are."""
    *ahead, words = codes.shape
    integers = [scheme for scheme in schemes if not scheme.floats]
    if stored is None:
        widths = {scales.shape[-1] * scheme.block[1] for scheme in integers if scheme.block and scales.shape}
        if len(widths) != 1:
            raise OddScaleError("it has no weight_shape")
        stored = (*ahead, widths.pop())
    if list(stored[:-1]) != ahead or stored[-1] < 1:
        raise OddScaleError(f"its shape is {list(codes.shape)}, and weight_shape says {list(stored)}")
    allowed = {scheme.bits for scheme in integers} or set(range(1, 9))
    bits = [bits for bits in sorted(allowed) if words == -(-stored[-1] * bits // 32)]
    if len(bits) != 1:
        may = " or ".join(map(str, bits or sorted(allowed)))
        raise OddScaleError(f"its rows of {stored[-1]} codes are {words} words, which {may} bits do not explain")
    return stored, bits[0]


def _check_zeros(zeros: TensorInfo, scales: TensorInfo, grid: tuple[int, ...], bits: int) -> None:
    packed = (*grid[:-2], -(-grid[-2] * bits // 32), grid[-1])
    if (zeros.dtype, zeros.shape) not in (("I32", packed), ("I8", scales.shape)):
        raise OddScaleError(
            f"{_last(zeros)} is {zeros.dtype} of shape {list(zeros.shape)}, not I32 of {list(packed)}"
            f" or I8 of {list(scales.shape)}"
        )


def _stored_shapes(tensors: Iterable[TensorInfo]) -> dict[str, tuple[int, ...]]:
    """What ``weight_shape`` tensors hold; nothing that could be a shape is ()."""
    of_file: dict[str, list[TensorInfo]] = defaultdict(list)
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        shapes[tensor.name] = ()
        if tensor.dtype in ("I64", "I32") and 0 < tensor.numel <= _MOST_AXES and not tensor.slices:
            of_file[tensor.shard.path].append(tensor)
    for some in of_file.values():
        for tensor, raw in zip(some, _stored(some), strict=True):
            numbers = struct.iter_unpack("<q" if tensor.dtype == "I64" else "<i", raw)
            shapes[tensor.name] = tuple(number for (number,) in numbers)
    return shapes


def _stored(tensors: Sequence[TensorInfo]) -> Iterator[bytes]:
    """The bytes of short tensors of one file."""
    shard = tensors[0].shard
    if shard.remote is None:
        with open_regular(shard.path) as (descriptor, _):
            for tensor in tensors:
                yield read_bytes(descriptor, tensor.nbytes, tensor.start, shard.path)
        return
    from ckptdiff.remote.fetching import ByteRange, fetch_ranges

    yield from fetch_ranges([ByteRange(shard.remote, tensor.start, tensor.stop) for tensor in tensors])


def _unlike_siblings(weights: Mapping[str, Decoded]) -> list[str]:
    """Weights whose scales are unlike most of those of the same shape whose names differ in numbers alone."""
    kinds: dict[tuple[object, ...], dict[str, tuple[object, ...]]] = defaultdict(dict)
    for name, weight in weights.items():
        kinds[_pattern(name), weight.encoding, weight.shape][name] = weight.block, weight.scales.dtype
    odd = []
    for of_names in kinds.values():
        (usual, count), *others = Counter(of_names.values()).most_common()
        if others and 2 * count > len(of_names):
            odd += [name for name, kind in of_names.items() if kind != usual]
    return odd


def _altered(weights: Mapping[str, Decoded], tensors: Mapping[str, TensorInfo], config: Quantization) -> list[str]:
    """Warnings of weights that the model changes before it multiplies with them."""
    scaled = [
        weight.codes for name, weight in weights.items() if name.removesuffix("weight") + "pre_quant_scale" in tensors
    ]
    warnings = [f"{config.path}: its transform_config rotates weights: their values are compared as stored"] * (
        config.rotated and bool(weights)
    )
    if scaled:
        warnings.append(f"{_first(scaled)}: pre_quant_scale beside it scales its columns: compared without")
    return warnings


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _last(tensor: TensorInfo) -> str:
    return tensor.name.rpartition(".")[2]


def _first(tensors: Sequence[TensorInfo]) -> str:
    """File and name of the first one, and how many more there are."""
    more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
    return f"{tensors[0].shard.path}: {tensors[0].name}{more}"


def scaled_modules(names: Iterable[str]) -> frozenset[str]:
    """Names of the modules, or of the fused tensors, that a checkpoint of these tensors holds scales for."""
    split = (name.rpartition(".") for name in names if "scale" in name)
    return frozenset(module for module, _, parameter in split if "scale" in parameter)


def is_scaled(tensor: Weight, modules: frozenset[str]) -> bool:
    """Whether a tensor is fp8 and belongs to one of those."""
    return tensor.dtype in FP8 and _is_of(tensor, modules)


def is_packed(tensor: Weight, modules: frozenset[str]) -> bool:
    """Whether a tensor holds packed codes: by its name, or because it belongs to one of those."""
    if tensor.dtype not in _INTEGERS:
        return False
    own = tensor.name.rpartition(".")[2]
    if own.endswith((*_ENDINGS, "qweight")) or (tensor.dtype == "U8" and own.endswith("weight")):
        return True
    return tensor.dtype != "I32" and _is_of(tensor, modules) and not any(word in own for word in _NO_CODES)


def _is_of(tensor: Weight, modules: frozenset[str]) -> bool:
    return tensor.name.rpartition(".")[0] in modules or tensor.name in modules
