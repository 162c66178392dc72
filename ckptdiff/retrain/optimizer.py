"""Make optimizers masked: state on masked coordinates only, and everything else left alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ckptdiff.errors import MaskError
from ckptdiff.retrain.indexed_step import Moving, step_indexed
from ckptdiff.retrain.kernels.masked_steps import masked_steps, sum_masked_squares
from ckptdiff.retrain.packed import PackedMask, nothing_to_train, require_fit
from ckptdiff.retrain.refusals import not_known, require_known, require_state, require_unmoved, require_whole
from ckptdiff.retrain.support import NARROW, IndexSupport, Masked, TileSupport, state_dtype, support_of
from ckptdiff.retrain.tile_rows import TileRows

_UNKNOWN: Any = object()


class MaskedOptimizer(torch.optim.Optimizer, ABC):  # type: ignore[misc]
    """An optimizer that holds state for masked coordinates only and never writes to any other.

    Subclasses say what a step is: to a compiled kernel, for parameters in main memory, and to torch's own functional
    form on gathered values, for all others.

    Parameters
    ----------
    params : iterable
        As for any torch optimizer. A parameter without a mask, or with an empty one, never moves.
    masks : mapping of Parameter to PackedMask
        Such as :func:`~ckptdiff.retrain.load_masks` returns. It is not kept: the optimizer holds two bytes per masked
        coordinate of a float32 or bfloat16 parameter in main memory, four of any other.
    defaults : dict
    fp32_master : bool
        Hold float32 masters of the masked coordinates of 16-bit parameters (four bytes each). Without them, steps
        smaller than half a unit in the last place are lost. Where something else changes a parameter, its master
        follows.

    Raises
    ------
    MaskError
        No parameter has a masked coordinate; a mask of another shape; a parameter that is sharded.
    OptionError
        A number of a group is out of range, or it asks for an option of torch's that this optimizer does not have.
    """

    options: tuple[str, ...]
    """What each of its groups holds beside parameters; torch writes more into `defaults` when a state is loaded."""
    rule: int
    """What the kernel calls a step of this optimizer."""
    columns: tuple[str, str]
    """Slots in the order of the kernel's state, whether a group uses them or not; "" for none."""

    def __init__(
        self,
        params: Iterable[Any],
        masks: Mapping[Any, PackedMask],
        defaults: dict[str, Any],
        fp32_master: bool,
    ) -> None:
        self._masks: Mapping[Any, PackedMask] | None = masks
        self._known: dict[Tensor, Masked | None] = {}
        self._fp32_master = fp32_master
        super().__init__(params, defaults)
        self._masks = None
        if not any(self._known.values()):
            raise nothing_to_train(masks, "load the masks of the parameters that the optimizer has")

    @abstractmethod
    def slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the state that each masked coordinate has."""

    @abstractmethod
    def require_range(self, group: Mapping[str, Any]) -> None:
        """Raise an OptionError for numbers that make no step."""

    @abstractmethod
    def constants(self, group: dict[str, Any], step: int, fresh: bool) -> list[float]:
        """Scalars of a step, as the kernel takes them; `fresh` if a slot is new, and zero."""

    @abstractmethod
    def functional(
        self,
        group: dict[str, Any],
        values: list[Tensor],
        gradients: list[Tensor],
        states: Sequence[Any],
        fresh: Sequence[bool],
    ) -> None:
        """Torch's own step, on the gathered values, gradients and states of parameters, each of shape (masked,)."""

    def __getstate__(self) -> dict[str, Any]:
        """All that copy and pickle need; torch names but its own attributes."""
        ours = {name: getattr(self, name) for name in ("_masks", "_known", "_fp32_master")}
        return {**super().__getstate__(), **ours}

    @property
    def nbytes(self) -> int:
        """Bytes of state and of masked positions."""
        held = chain.from_iterable(state.values() for state in self.state.values())
        states: int = sum(value.nbytes for value in held if isinstance(value, Tensor) and value.ndim)
        return states + sum(masked.support.nbytes for masked in self._known.values() if masked)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with their masks as ``{"params": ..., "masks": masks}``.

        Groups that the optimizer is made of need none: theirs are those it is given, and not kept.
        """
        group = dict(param_group)
        masks = group.pop("masks", self._masks)
        if masks is None:
            raise MaskError(
                "a group of parameters that came later has no masks",
                expected='{"params": parameters, "masks": masks}',
                found="no masks; those that the optimizer was made with are not kept",
                hint="give the masks of these parameters along; {} leaves them as they are",
            )
        self._require_usable({**self.defaults, **group})
        before = len([*self._parameters()])
        super().add_param_group(group)
        try:
            self._known |= dict(self._masked(group, masks, before))
        except MaskError:
            self.param_groups.pop()
            raise

    def _masked(self, group: dict[str, Any], masks: Mapping[Any, PackedMask], before: int) -> Iterator[Any]:
        """Each parameter of a group, and what there is to know of it: None without a masked coordinate."""
        names = getattr(masks, "names", {})
        called = group.get("param_names", [f"parameter {before + i}" for i in range(len(group["params"]))])
        for parameter, otherwise in zip(group["params"], called, strict=True):
            name = names.get(parameter, otherwise)
            require_whole(parameter, name)
            if parameter not in masks:
                yield parameter, None
                continue
            mask = require_fit(masks[parameter], tuple(parameter.shape), name)
            support = support_of(mask, parameter) if mask.count else None
            yield parameter, Masked(support, mask.count, mask.fingerprint, mask.shape, name) if support else None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; parameters without a gradient are skipped.

        Returns
        -------
        float or None
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Whatever cannot be stepped is refused before anything moves.
        moving = [(group, self._begin_states(group)) for group in self.param_groups]
        for group, parameters in moving:
            indexed = [row for row in parameters if isinstance(row[1].support, IndexSupport)]
            if indexed:
                step_indexed(partial(self.functional, group), indexed)
        self._step_tiles(moving)
        # What a kernel has written autograd must know of, or a backward pass through old values would not be refused.
        for parameter, *_ in chain.from_iterable(parameters for _, parameters in moving):
            increment_version(parameter)
        return loss

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, *, error_if_nonfinite: bool = False) -> Tensor:
        """Scale gradients so that their norm over the masked coordinates is at most `max_norm`.

        Returns
        -------
        Tensor
            That norm before, summed in float64; the value that ``torch.nn.utils.clip_grad_norm_`` gives where gradients
            are zero outside the masks.

        Raises
        ------
        RuntimeError
            If it is not finite and `error_if_nonfinite` is set.
        """
        squares: list[float] = []
        rows = TileRows()
        moving = list(chain.from_iterable(map(self._moving, self.param_groups)))
        for parameter, masked in moving:
            if isinstance(masked.support, TileSupport):
                rows.add(parameter, masked)
            else:
                gathered = parameter.grad.reshape(-1)[masked.support.index]
                squares.append(float(gathered.double().square().sum()))
        sums = np.zeros(rows.units)
        rows.run(sum_masked_squares, sums)
        squares.extend(sums)
        norm = torch.tensor(math.sqrt(math.fsum(squares)))
        if error_if_nonfinite and not norm.isfinite():
            raise RuntimeError(f"the norm of the masked gradients is {norm.item()}")
        torch.nn.utils.clip_grads_with_norm_([parameter for parameter, _ in moving], max_norm, norm)
        return norm

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, to resume where it was saved; any number of times.

        Raises
        ------
        MaskError
            The state is not one of this optimizer, or was made with other masks.
        OptionError
            It asks for an option that this optimizer does not have, or a number is out of range.
        """
        taken: dict[str, Any] = {}

        def look(_: object, adapted: dict[str, Any]) -> None:
            self._require_own(adapted)
            taken.update(adapted)

        def restore(_: object) -> None:
            # Torch has cast what it found to the dtype of the parameter, and float32 state would lose 16 bits by that.
            for key, parameter in zip(_keys(taken), self._parameters(), strict=True):
                place = {"device": parameter.device, "dtype": state_dtype(parameter)}
                for name, value in taken["state"].get(key, {}).items():
                    if isinstance(value, Tensor):
                        self.state[parameter][name] = value.to(copy=True, **(place if value.ndim else {}))

        # The last hook before, so that it sees what others have made of the state, and the first one after.
        with (
            self.register_load_state_dict_pre_hook(look),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ):
            super().load_state_dict(state_dict)

    def _parameters(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _require_own(self, state_dict: dict[str, Any]) -> None:
        """Refuse a state of another optimizer, or of other masks."""
        for group in state_dict["param_groups"]:
            lacks = set(self.options) - group.keys()
            if lacks:
                raise MaskError(
                    "the optimizer's state belongs to another optimizer",
                    expected=f"groups of {type(self).__name__}, with {', '.join(sorted(self.options))}",
                    found=f"none of {', '.join(sorted(lacks))}",
                    hint="load the state into an optimizer of the class that saved it",
                )
            self._require_usable(group)
        for key, parameter in zip(_keys(state_dict), self._parameters(), strict=False):
            state, masked = state_dict["state"].get(key), self._known.get(parameter)
            if not state:  # there was no step yet, or nothing of it is masked
                continue
            if masked is None or state.get("mask") != masked.fingerprint:
                raise MaskError(
                    "the optimizer's state belongs to other masks",
                    tensor=masked.name if masked else None,
                    expected="a state that was saved with the masks of this optimizer",
                    found="one of other masks" if "mask" in state else "one of an optimizer without masks",
                    hint="load the masks that the saved run used",
                )
            for slot in (*self.columns, "master"):
                if slot in state:
                    require_state(state[slot], slot, parameter, masked, loading=True)

    def _require_usable(self, group: Mapping[str, Any]) -> None:
        require_known(group, self.options)
        self.require_range(group)

    def _moving(self, group: dict[str, Any]) -> Iterator[tuple[Tensor, Masked]]:
        """Parameters of a group that have masked coordinates and a gradient."""
        for parameter in group["params"]:
            if parameter.grad is not None:
                masked = self._known.get(parameter, _UNKNOWN)
                if masked is _UNKNOWN:
                    require_whole(parameter, None)  # accelerate puts such in place of those that there were
                    raise not_known(parameter)
                if masked is None:
                    self.state[parameter]  # becomes {}: torch.distributed.checkpoint asks for those of all
                else:
                    require_unmoved(parameter, masked)
                    yield parameter, masked

    def _begin_states(self, group: dict[str, Any]) -> list[Moving]:
        """Add what the state of a group's moving parameters lacks."""
        moving, slots = [], self.slots(group)
        for parameter, masked in self._moving(group):
            state = self.state[parameter]
            # A state that was there may lack some: of another dtype, or from before momentum was turned on.
            fresh = not all(slot in state for slot in slots)
            if fresh or not state or (parameter.dtype in NARROW and "master" not in state):
                self._fill_state(state, parameter, masked, slots)
            if state["step"].dtype is not torch.float32 or not state["step"].is_cpu:
                state["step"] = state["step"].float().cpu()
            dtype, count, main = state_dtype(parameter), masked.count, parameter.is_cpu
            for slot in slots if "master" not in state else (*slots, "master"):
                value = state[slot]
                # In short what follows, for a call costs more than all of it.
                if not (main and type(value) is Tensor and value.is_cpu and value.dtype is dtype
                        and value.numel() == count and value.is_contiguous()):  # fmt: skip
                    require_state(value, slot, parameter, masked)
            moving.append((parameter, masked, state, fresh))
        return moving

    def _fill_state(self, state: dict[str, Any], parameter: Tensor, masked: Masked, slots: Iterable[str]) -> None:
        kept = {"dtype": state_dtype(parameter), "device": parameter.device}
        if not state:
            state["mask"] = masked.fingerprint
            state["step"] = torch.zeros((), dtype=torch.float32)
        for slot in slots:
            if slot not in state:
                state[slot] = torch.zeros(masked.count, **kept)
        if self._fp32_master and parameter.dtype in NARROW and "master" not in state:
            # A NaN rounds to no code but its own, so the first step takes every value from the parameter.
            state["master"] = torch.full((masked.count,), math.nan, **kept)

    def _step_tiles(self, moving: list[tuple[dict[str, Any], list[Moving]]]) -> None:
        """One call of the compiled kernel for all parameters that it serves."""
        tiles = [(group, [row for row in rows if isinstance(row[1].support, TileSupport)]) for group, rows in moving]
        counts = [state["step"] for _, rows in tiles for _, _, state, _ in rows]
        if not counts:
            return
        found = iter(torch.stack(counts).tolist())
        table, constants = TileRows(), list[list[float]]()
        for group, rows in tiles:
            places: dict[tuple[float, bool], int] = {}
            used = ("step", *(slot if slot in self.slots(group) else "" for slot in self.columns))
            for parameter, masked, state, fresh in rows:
                key = step, fresh = next(found) + 1, fresh
                if key not in places:
                    places[key] = len(constants)
                    constants.append(self.constants(group, int(step), fresh))
                held = [state[slot].data_ptr() if slot else 0 for slot in used]
                masters = state["master"].data_ptr() if "master" in state else 0
                table.add(parameter, masked, *held, masters, self.rule, places[key])
        table.run(masked_steps, np.array(constants, np.float32))


def _keys(state_dict: dict[str, Any]) -> Iterator[Any]:
    """What a state calls its parameters, in order."""
    return chain.from_iterable(group["params"] for group in state_dict["param_groups"])
