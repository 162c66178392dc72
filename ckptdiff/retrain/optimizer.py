"""Make optimizers masked: state on masked coordinates only, and everything else left alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ckptdiff.errors import MaskError
from ckptdiff.retrain.kernels.masked_steps import sum_masked_squares
from ckptdiff.retrain.packed import PackedMask, require_fit
from ckptdiff.retrain.refusals import require_dense, require_known, require_unmoved, require_whole
from ckptdiff.retrain.step_threads import run_all
from ckptdiff.retrain.support import IndexSupport, Support, TileSupport, flat_view, support_of

_Tiles: TypeAlias = tuple[Tensor, TileSupport, dict[str, Any], bool]
"""A parameter of the compiled kernels, its group, and whether a slot of its state is new."""
_NARROW = (torch.bfloat16, torch.float16)


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
    kernel: Callable[..., None]
    """One step on some tiles of a parameter."""
    every_slot: tuple[str, ...]
    """Slots in the order of the kernel's state, whether a group uses them or not."""

    def __init__(
        self,
        params: Iterable[Any],
        masks: Mapping[Any, PackedMask],
        defaults: dict[str, Any],
        fp32_master: bool,
    ) -> None:
        self._masks: Mapping[Any, PackedMask] | None = masks
        self._supports: dict[Tensor, Support] = {}
        self._fingerprints: dict[Tensor, int] = {}
        self._shapes: dict[Tensor, tuple[int, ...]] = {}
        self._names: dict[Tensor, str] = {}
        self._fp32_master = fp32_master
        super().__init__(params, defaults)
        self._masks = None
        if not self._supports:
            raise MaskError(
                "no parameter of the optimizer has a masked coordinate: there is nothing to train",
                expected=f"some of the {len(masks)} masked parameters",
                found="none of them, or empty masks",
                hint="load the masks of the parameters that the optimizer has",
            )

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
        states: list[Any],
        fresh: list[bool],
    ) -> None:
        """Torch's own step, on the gathered values, gradients and states of parameters, each of shape (masked,)."""

    def __getstate__(self) -> dict[str, Any]:
        """All that copy and pickle need; torch names but its own attributes."""
        ours = ("_masks", "_supports", "_fingerprints", "_shapes", "_names", "_fp32_master")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in ours}}

    @property
    def nbytes(self) -> int:
        """Bytes of state and of masked positions."""
        held = chain.from_iterable(state.values() for state in self.state.values())
        states: int = sum(value.nbytes for value in held if isinstance(value, Tensor) and value.ndim)
        return states + sum(support.nbytes for support in self._supports.values())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; only while the optimizer is made, since it does not keep the masks."""
        if self._masks is None:
            raise MaskError(
                "a masked optimizer takes all its parameters when it is made",
                found="parameters that came later",
                hint="make another optimizer; freeze_outside takes parameters that come later",
            )
        self._require_usable({**self.defaults, **param_group})
        super().add_param_group(param_group)
        names = getattr(self._masks, "names", {})
        for parameter in param_group["params"]:
            name = names.get(parameter)
            require_whole(parameter, name)
            if parameter not in self._masks:
                continue
            mask = require_fit(self._masks[parameter], tuple(parameter.shape), name)
            if mask.count:
                self._supports[parameter] = support_of(mask, parameter)
                self._fingerprints[parameter] = mask.fingerprint
                self._shapes[parameter] = mask.shape
                if name is not None:
                    self._names[parameter] = name

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
        moving = [(group, list(self._moving(group))) for group in self.param_groups]
        compiled: list[_Tiles] = []
        for group, parameters in moving:
            indexed: dict[Tensor, bool] = {}
            for parameter, support in parameters:
                fresh = self._begin_state(parameter, support, group)
                if isinstance(support, TileSupport):
                    compiled.append((parameter, support, group, fresh))
                else:
                    indexed[parameter] = fresh
            if indexed:
                self._step_indexed(group, indexed)
        run_all(self._tile_work(compiled), sum(support.pieces for _, support, _, _ in compiled))
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
        pieces = 0
        moving = list(chain.from_iterable(map(self._moving, self.param_groups)))
        work: list[Callable[[], object]] = []
        for parameter, support in moving:
            if isinstance(support, TileSupport):
                gradient = flat_view(parameter.grad.contiguous())
                pieces += support.pieces
                for span in support.spans():
                    work.append(partial(_add_square, squares, gradient, support, span))
            else:
                gathered = parameter.grad.reshape(-1)[support.index]
                squares.append(float(gathered.double().square().sum()))
        run_all(work, pieces)
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

        # The last of the hooks, so that it sees what others have made of the state.
        with self.register_load_state_dict_pre_hook(look):
            super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in taken["param_groups"])
        # Torch has cast what it found to the dtype of the parameter, and float32 state would lose 16 bits by that.
        for key, parameter in zip(saved, self._parameters(), strict=True):
            for name, value in taken["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    device = parameter.device if value.ndim else value.device
                    self.state[parameter][name] = value.to(device, copy=True)

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
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for key, parameter in zip(saved, self._parameters(), strict=False):
            state = state_dict["state"].get(key)
            if state is not None and state.get("mask") != self._fingerprints.get(parameter):
                raise MaskError(
                    "the optimizer's state belongs to other masks",
                    tensor=self._names.get(parameter),
                    expected="a state that was saved with the masks of this optimizer",
                    found="one of other masks" if "mask" in state else "one of an optimizer without masks",
                    hint="load the masks that the saved run used",
                )

    def _require_usable(self, group: Mapping[str, Any]) -> None:
        require_known(group, self.options)
        self.require_range(group)

    def _moving(self, group: dict[str, Any]) -> Iterator[tuple[Tensor, Support]]:
        """Parameters of a group that have masked coordinates and a gradient."""
        for parameter in group["params"]:
            require_whole(parameter, None)  # accelerate puts such in place of those that there were
            if parameter.grad is not None and parameter in self._supports:
                support, name = self._supports[parameter], self._names.get(parameter)
                require_dense(parameter.grad, name)
                require_unmoved(parameter, support, self._shapes[parameter], name)
                yield parameter, support

    def _begin_state(self, parameter: Tensor, support: Support, group: dict[str, Any]) -> bool:
        """Add what a parameter's state lacks; returns whether a slot did not exist."""
        state = self.state[parameter]
        narrow = parameter.dtype in _NARROW
        kept = {"dtype": torch.float32 if narrow else parameter.dtype, "device": parameter.device}
        if not state:
            state["mask"] = self._fingerprints[parameter]
            state["step"] = torch.zeros((), dtype=torch.float32)
        # A state that was there may lack some: of another dtype, or from before momentum was turned on.
        new = [slot for slot in self.slots(group) if slot not in state]
        for slot in new:
            state[slot] = torch.zeros(support.count, **kept)
        if narrow and self._fp32_master and "master" not in state:
            # A NaN rounds to no code but its own, so the first step takes every value from the parameter.
            state["master"] = torch.full((support.count,), math.nan, **kept)
        return bool(new)

    def _tile_work(self, parameters: Iterable[_Tiles]) -> Iterator[Callable[[], object]]:
        nothing = np.empty(0, np.float32)
        known: dict[tuple[int, int, bool], NDArray[np.float32]] = {}
        for parameter, support, group, fresh in parameters:
            state = self.state[parameter]
            count = int(state["step"]) + 1
            state["step"].fill_(count)
            key = id(group), count, fresh
            if key not in known:
                known[key] = np.array(self.constants(group, *key[1:]), np.float32)
            used = (*self.slots(group), "master")
            held = tuple(
                state[slot].numpy() if slot in used and slot in state else nothing
                for slot in (*self.every_slot, "master")
            )
            values, gradients = flat_view(parameter), flat_view(parameter.grad.contiguous())
            for span in support.spans():
                yield partial(self.kernel, values, gradients, held, support.positions, support.starts, span, known[key])

    def _step_indexed(self, group: dict[str, Any], parameters: Mapping[Tensor, bool]) -> None:
        """Gather, let torch step, scatter; `parameters` says of each whether a slot of its state is new."""
        states = [self.state[parameter] for parameter in parameters]
        values, gradients = [], []
        for parameter, state in zip(parameters, states, strict=True):
            index = self._index(parameter)
            found = parameter.reshape(-1)[index]
            wide = found.float() if parameter.dtype in _NARROW else found
            if "master" in state:
                wide = torch.where(state["master"].to(found.dtype) == found, state["master"], wide)
            values.append(wide)
            gradients.append(parameter.grad.reshape(-1)[index].to(wide.dtype))
        self.functional(group, values, gradients, states, list(parameters.values()))
        for parameter, state, value in zip(parameters, states, values, strict=True):
            if "master" in state:
                state["master"] = value
            flat = parameter.reshape(-1)
            flat[self._index(parameter)] = value.to(parameter.dtype)
            if flat.data_ptr() != parameter.data_ptr():  # it was not contiguous, so this is a copy
                parameter.copy_(flat.view(parameter.shape))

    def _index(self, parameter: Tensor) -> Tensor:
        support = self._supports[parameter]
        assert isinstance(support, IndexSupport)
        return support.index


def _add_square(squares: list[float], gradient: NDArray[Any], support: TileSupport, span: tuple[int, int]) -> None:
    squares.append(sum_masked_squares(gradient, support.positions, support.starts, span))
