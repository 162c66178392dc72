"""Find which parameters of a model the masks of a run file are for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch.nn import Module, Parameter

from ckptdiff.checkpoint.header import Shard, TensorInfo
from ckptdiff.checkpoint.layouts import assemble, reopened
from ckptdiff.checkpoint.matching import match_names
from ckptdiff.checkpoint.weights import Piece
from ckptdiff.figures.result import TensorFacts

# PEFT moves the layer it adapts one level down, and keeps a trainable copy of modules it saves.
_PEFT = re.compile(r"\.base_layer(?=\.)|\.modules_to_save\.[^.]+(?=\.)")
_PEFT_ORIGINAL = re.compile(r"\.original_module\.")
_NOWHERE = Shard("", 0, 0, 0, 0, "", {})

Copies: TypeAlias = Sequence[tuple[str, Parameter]]
"""Name in the model and parameter, of one name: PEFT may keep several. None of them: it is a buffer."""


@dataclass(frozen=True, slots=True)
class Matches:
    """What was found, by the names of masks in the run file."""

    whole: dict[str, Copies]
    """What has the layout of its mask."""
    pieces: dict[str, tuple[Piece, ...]]
    """Of masks of another layout: the `source` is what is trained, and `tuned_index` lies in it."""
    sources: dict[str, Copies]
    """By the names that sources of pieces have."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Target:
    info: TensorInfo
    copies: Copies


def match_parameters(
    shapes: Mapping[str, tuple[int, ...]], other_names: Mapping[str, TensorFacts], model: Module
) -> Matches:
    """Find what is trained of a model: by name, by pieces that the run compared, and by the table of layouts.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        Of the masks, by their names in the run file.
    other_names : mapping of str to TensorFacts
        Of tensors that the model calls as the tuned side does. What is not in it is called as in the run file.
    model : Module
    """
    called = {name: other_names[name].tuned_name or name if name in other_names else name for name in shapes}
    cut = {name: other_names[name].pieces for name in shapes if name in other_names and other_names[name].pieces}
    wanted = [one.tuned_name for pieces in cut.values() for one in pieces]
    wanted += [other for name, other in called.items() if name not in cut]
    found, rest, warnings = _by_name(dict.fromkeys(wanted), model)
    whole: dict[str, _Target] = {}
    pieces: dict[str, tuple[Piece, ...]] = {}
    left: dict[str, str] = {}
    for name, other in called.items():
        if name not in cut:
            if other in found:
                whole[name] = found[other]
            else:
                left[other] = name
        elif all(one.tuned_name in found for one in cut[name]):
            pieces[name] = tuple(
                Piece(found[one.tuned_name].info, one.base_index, one.tuned_index, one.transposed) for one in cut[name]
            )
        else:
            left[name] = name  # what the run put together has no name of its own on the tuned side
    again = reopened((_info(called[name], shapes[name]), target.info) for name, target in whole.items())
    opened = {called[name]: name for name in whole if called[name] in again}
    rest |= {whole[name].info.name: whole[name] for name in opened.values()}
    assembly = assemble(
        {other: _info(other, shapes[name]) for other, name in {**left, **opened}.items()},
        {name: target.info for name, target in rest.items()},
    )
    for other, name in {**left, **opened}.items():
        if other in assembly.renamed:
            whole[name] = rest[assembly.renamed[other]]
        elif other in assembly.assembled and assembly.assembled[other].whole:
            pieces[name] = assembly.assembled[other].pieces
            whole.pop(name, None)
    return Matches(
        {name: target.copies for name, target in whole.items()},
        pieces,
        {target.info.name: target.copies for target in (*found.values(), *rest.values())},
        (*warnings, *(f"masks as base, the model as tuned: {warning}" for warning in assembly.warnings)),
    )


def _by_name(wanted: Iterable[str], model: Module) -> tuple[dict[str, _Target], dict[str, _Target], tuple[str, ...]]:
    """Match names as ``ckptdiff diff`` does, then without what PEFT puts inside: found, not found, and warnings."""
    parameters = {name: _target(name, [(name, p)]) for name, p in model.named_parameters(remove_duplicate=False)}
    buffers = {
        name: _Target(_info(name, tuple(buffer.shape)), ())
        for name, buffer in model.named_buffers()
        if name not in parameters
    }
    own = {**parameters, **buffers}
    matched, warnings = match_names(wanted, own)
    # A name of the model's own may look like one of PEFT's: those that match as they are come first.
    taken = {*matched.values()}
    inside = _without_peft(target for name, target in parameters.items() if name not in taken)
    inner, more = match_names((name for name in wanted if name not in matched), inside)
    found = {name: own[other] for name, other in matched.items()}
    found |= {name: inside[other] for name, other in inner.items()}
    used = {*inner.values()}
    rest = {name: target for name, target in inside.items() if name not in used}
    rest |= {name: target for name, target in buffers.items() if name not in taken}
    return found, rest, tuple(dict.fromkeys((*warnings, *more)))


def _without_peft(targets: Iterable[_Target]) -> dict[str, _Target]:
    """Parameters by the name without what PEFT puts inside it."""
    found: dict[str, list[tuple[str, Parameter]]] = {}
    for target in targets:
        for name, parameter in target.copies:
            if not _PEFT_ORIGINAL.search(name):
                found.setdefault(_PEFT.sub("", name), []).append((name, parameter))
    return {name: _target(name, copies) for name, copies in found.items()}


def _target(name: str, copies: Copies) -> _Target:
    return _Target(_info(name, tuple(copies[0][1].shape)), copies)


def _info(name: str, shape: tuple[int, ...]) -> TensorInfo:
    """A tensor as the table of layouts wants it; what it stores is of no account."""
    return TensorInfo(name, "U8", shape, _NOWHERE, 0, 0)
