"""Load the masks of a run file for the parameters of a model."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch.nn import Module, Parameter

from ckptdiff.checkpoint.weights import Piece
from ckptdiff.errors import MaskError, OptionError, first_few
from ckptdiff.figures.result import RowCounts, TensorFacts
from ckptdiff.retrain.match import Copies, Matches, match_parameters
from ckptdiff.retrain.packed import PackedMask
from ckptdiff.retrain.parameters import MatchReport, ParameterMasks
from ckptdiff.retrain.placing import place
from ckptdiff.runfile.mask import Mask
from ckptdiff.runfile.reader import RunFile
from ckptdiff.runfile.schema import packed_bytes

_WRAPPERS = re.compile(
    r"^(?:(?:module|base_model\.model)\.)+|(?:^|(?<=\.))_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\."
)
_HINT = "load masks into the model whose checkpoints were compared; of FSDP, only fully_shard keeps shapes"


def load_masks(
    run_file: str | os.PathLike[str] | RunFile,
    model: Module,
    *,
    strict: bool = True,
    names: Literal["base", "tuned"] = "base",
) -> ParameterMasks:
    """Read the masks of a run file for the parameters of a model.

    Names are matched as ``ckptdiff diff`` matches them: exactly, then without the prefixes of DDP, FSDP, torch.compile,
    activation checkpointing and PEFT, where that is unique, and then without what PEFT puts inside a name. A parameter
    with two names (tied weights) is found by either of them; each copy that PEFT keeps of a module gets its mask. What
    the model has in another layout (experts in one parameter or one by one, gate and up or q, k and v fused or not,
    swapped axes) is found by the rules of ``ckptdiff diff``, and each mask put where its tensor is. Of a tensor that
    the run did not mask, nothing is trained.

    A vocabulary of other rows than the mask's, as in a run that compared the rows that both sides have, is masked in
    those rows. Masks of quantised weights are of decoded values, and fit parameters that hold such.

    Parameters
    ----------
    run_file : path-like or RunFile
    model : Module
        Its parameters must have their whole shapes. With FSDP2, load the masks after ``fully_shard``, which makes new
        parameters; the flat ones of FSDP1 fit no mask once there are several ranks.
    strict : bool
        Refuse masks without a parameter, and trainable parameters without a mask. Otherwise both are listed in the
        ``report`` of the result, and in a warning, with the share of the masks' coordinates that is left out.
    names : {"base", "tuned"}
        Which side's names the model has; they differ in a run with ``--map``, and where layouts differ.

    Returns
    -------
    ParameterMasks
        Packed, one bit per coordinate, in memory. Beside them a mask at a time is in memory.

    Raises
    ------
    MaskError
        A mask of another shape than its parameter, or of decoded values, which the parameter does not hold; two
        different masks of one tied parameter; nothing that matches,
        or with `strict` anything that does not; no coordinate in any mask, or in none of a parameter that is trained.
    OptionError
        `names` is neither side.
    RunFileError
        The run file cannot be read, or holds no masks.

    Examples
    --------
    >>> from ckptdiff.retrain import load_masks
    >>> masks = load_masks("run.h5", model)
    >>> masks.report.complete
    True
    """
    if isinstance(run_file, RunFile):
        masks = find_masks(run_file, model, strict, names)
    else:
        with RunFile(run_file) as run:
            masks = find_masks(run, model, strict, names)
    if not masks.report.whole:
        warnings.warn(str(masks.report), stacklevel=2)
    return masks


def find_masks(run: RunFile, model: Module, strict: bool, names: Literal["base", "tuned"]) -> ParameterMasks:
    """Do what :func:`load_masks` does, without a warning."""
    run.require_masks()
    if names not in ("base", "tuned"):
        raise OptionError("unknown side", expected="names of the base or of the tuned side", found=names)
    facts = {facts.name: facts for facts in run.load().tensors}
    stored = {name: run.masks[name] for name in run.masks}
    shapes = {name: mask.shape for name, mask in stored.items()}
    found = match_parameters(shapes, facts if names == "tuned" else {}, model)
    masks: dict[Parameter, PackedMask] = {}
    known: dict[Parameter, str] = {}
    more_rows = []
    for name, copies in found.whole.items():
        for full_name, parameter in copies:
            mask = _read(stored[name], facts[name], full_name, parameter, run.path)
            _require_same(masks.setdefault(parameter, mask), mask, name, run.path)
            known.setdefault(parameter, name)
            if mask.shape[:1] > stored[name].shape[:1]:
                more_rows.append(full_name)
    put = _Put.of(found, stored, facts, run.path)
    for name, bits in put.bits.items():
        for full_name, parameter in found.sources[name]:
            mask = PackedMask(tuple(parameter.shape), bits)
            _require_same(masks.setdefault(parameter, mask), mask, full_name, run.path)
            known.setdefault(parameter, _WRAPPERS.sub("", name))
    decoded = [name for name in stored if facts[name].kept and name not in found.whole and name not in found.pieces]
    told = {"rows that the masks do not have stay as they are": more_rows}
    told["masks of decoded values, which a model that is loaded dequantised has"] = decoded
    report = _report(found, stored, masks, put, told, model)
    result = ParameterMasks(masks, known, report)
    _require_useful(result, strict, run.path)
    return result


class _Put:
    """Masks put together of those of another layout, by the name of what has them."""

    def __init__(self) -> None:
        self.bits: dict[str, NDArray[np.uint8]] = {}
        self._left: dict[str, int] = {}

    @classmethod
    def of(cls, found: Matches, stored: Mapping[str, Mask], facts: Mapping[str, TensorFacts], path: str) -> _Put:
        put = cls()
        for name, pieces in found.pieces.items():
            wanted = [piece for piece in pieces if found.sources[piece.source.name]]
            if wanted:
                mask = PackedMask(stored[name].shape, stored[name].packed())
                for piece in wanted:
                    for full_name, parameter in found.sources[piece.source.name]:
                        _require_values(facts[name], full_name, parameter, path)
                    put._add(mask, piece, name, path)
        return put

    def _add(self, mask: PackedMask, piece: Piece, name: str, path: str) -> None:
        for index, shape in ((piece.base_index, mask.shape), (piece.tuned_index, piece.source.shape)):
            if len(index) != len(shape) or any(stop > size for (_, stop, _), size in zip(index, shape, strict=True)):
                raise _unfit(name, path, f"part {_listed(index)} of {piece.source.name}", f"shape {shape}")
        source = piece.source
        bits = self.bits.setdefault(source.name, np.zeros(packed_bytes(source.numel), np.uint8))
        covered = place(mask.bits, mask.shape, piece, bits)
        self._left[source.name] = self._left.get(source.name, source.numel) - covered

    @property
    def partly(self) -> set[str]:
        """What has coordinates that no mask is for."""
        return {name for name, left in self._left.items() if left}


def _listed(index: tuple[tuple[int, int, int], ...]) -> str:
    return ", ".join(f"{start}:{stop}" + (f":{step}" if step != 1 else "") for start, stop, step in index)


def _report(
    found: Matches,
    stored: Mapping[str, Mask],
    masks: Mapping[Parameter, PackedMask],
    put: _Put,
    told: Mapping[str, list[str]],
    model: Module,
) -> MatchReport:
    trained = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    places = {name: [copies] for name, copies in found.whole.items()}
    for name, pieces in found.pieces.items():
        places[name] = [found.sources[source] for source in dict.fromkeys(piece.source.name for piece in pieces)]
    moved = {name: [copies for copies in held if copies] for name, held in places.items()}
    frozen = [
        name
        for name, held in moved.items()
        if held and not any(parameter in trained for copies in held for _, parameter in copies)
    ]
    buffers = [name for name, held in moved.items() if not held]
    # An empty mask, such as of frequencies that a model computes and its checkpoint stores, asks for no parameter.
    unused = [name for name, mask in stored.items() if mask.count and name not in places]
    partly = {parameter for name in put.partly for _, parameter in found.sources[name]}
    return MatchReport(
        matched={name: ", ".join(map(_trained_one, held)) for name, held in moved.items() if held},
        unused_masks=tuple(unused),
        unmasked_parameters=tuple(name for p, name in trained.items() if p not in masks or p in partly),
        frozen=tuple(frozen),
        buffers=tuple(buffers),
        warnings=(*found.warnings, *(f"{what}: {first_few(names)}" for what, names in told.items() if names)),
        coordinates=sum(mask.count for mask in stored.values()),
        left_out=sum(stored[name].count for name in (*unused, *frozen, *buffers)),
    )


def _trained_one(copies: Copies) -> str:
    """The name of the copy that is trained, if any is, else of the first."""
    return next((name for name, parameter in copies if parameter.requires_grad), copies[0][0])


def _read(mask: Mask, facts: TensorFacts, name: str, parameter: Parameter, path: str) -> PackedMask:
    _require_values(facts, name, parameter, path)
    shape = tuple(parameter.shape)
    if mask.shape == shape:
        return PackedMask(shape, mask.packed())
    if facts.rows is not None and _holds_rows(facts.rows, mask.shape, shape):
        fitting = np.zeros(packed_bytes(parameter.numel()), np.uint8)
        bits = mask.packed()[: fitting.size]
        fitting[: bits.size] = bits
        return PackedMask(shape, fitting)
    least = "" if facts.rows is None else f", or at least the {facts.rows.compared} rows that were compared"
    raise _unfit(mask.name, path, f"shape {shape} of {name}{least}", f"shape {mask.shape}")


def _holds_rows(rows: RowCounts, mask: tuple[int, ...], parameter: tuple[int, ...]) -> bool:
    """Whether a parameter has all rows that were compared: in others the mask holds nothing."""
    return len(parameter) == len(mask) and parameter[1:] == mask[1:] and parameter[0] >= rows.compared


def _require_values(facts: TensorFacts, name: str, parameter: Parameter, path: str) -> None:
    """Refuse what stores codes, where the run compared the values that they stand for."""
    dtype = parameter.dtype
    if facts.kept is not None and (not dtype.is_floating_point or dtype.itemsize == 1):
        raise MaskError(
            "a mask of decoded values, which its parameter does not hold",
            file=path,
            tensor=facts.name,
            expected=f"values in {name}, in 16 bits or more",
            found=f"{dtype} of shape {tuple(parameter.shape)}, compared as {facts.dtype_base} and {facts.dtype_tuned}",
            hint="load the model dequantised",
        )


def _unfit(name: str, path: str, expected: str, found: str) -> MaskError:
    return MaskError(
        "a mask does not fit its parameter", file=path, tensor=name, expected=expected, found=found, hint=_HINT
    )


def _require_same(first: PackedMask, mask: PackedMask, name: str, path: str) -> None:
    if not np.array_equal(first.bits, mask.bits):
        raise MaskError(
            "two different masks for one tied parameter",
            file=path,
            tensor=name,
            expected=f"{first.count} coordinates, as under its other name",
            found=f"{mask.count} coordinates, or others",
            hint="untie the weights, or compare the checkpoints with --exclude for one of the names",
        )


def _require_useful(masks: ParameterMasks, strict: bool, path: str) -> None:
    report = masks.report
    if not masks:
        raise MaskError(
            "no mask of the run file fits a parameter of the model",
            file=path,
            expected=f"masks of {first_few(report.unmasked_parameters) or 'parameters'}",
            found=str(report),
            hint="check that the run compared checkpoints of this model; names='tuned' goes by the other side's names",
        )
    if strict and not report.complete:
        raise MaskError(
            "the masks and the model's parameters do not match",
            file=path,
            expected="a parameter for each mask, and a mask for each trainable parameter",
            found=str(report),
            hint="strict=False trains what matches, and leaves the rest as it is",
        )
    if not masks.count:
        raise MaskError(
            "the masks are empty: there is nothing to train",
            file=path,
            found="no coordinate in any mask",
            hint="compare with a rule that selects more, such as --mask bitwise",
        )
    if not any(mask.count for parameter, mask in masks.items() if parameter.requires_grad):
        raise MaskError(
            "no masked parameter is trained: there is nothing to train",
            file=path,
            expected="requires_grad of some parameter with coordinates in its mask",
            found=str(report),
            hint="PEFT freezes what it adapts: load masks into the bare model, or set requires_grad first",
        )
