"""What masks and optimizers do not fit each other is refused before anything moves, and by the parameter's name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ckptdiff.errors import MaskError
from ckptdiff.retrain import MaskedAdamW, MaskedSGD, PackedMask, ParameterMasks, freeze_outside

KINDS: dict[str, Callable[..., Any]] = {
    "adamw": lambda p, m: MaskedAdamW(p, m, lr=0.1),
    "sgd": lambda p, m: MaskedSGD(p, m, lr=0.1, momentum=0.9),
}
each = pytest.mark.parametrize("kind", KINDS)
SLOT = {"adamw": "exp_avg", "sgd": "momentum_buffer"}
NAMES = ("up.weight", "down.weight")


def two(transposed: bool = False) -> tuple[list[torch.nn.Parameter], ParameterMasks]:
    """Parameters, and masks of three coordinates of each; transposed ones are stepped by torch."""
    parameters = [torch.nn.Parameter(torch.ones(4, 3).t() if transposed else torch.ones(3, 4)) for _ in NAMES]
    mask = PackedMask.of(np.eye(3, 4, dtype=bool))
    return parameters, ParameterMasks(dict.fromkeys(parameters, mask), dict(zip(parameters, NAMES, strict=True)))


def step(optimizer: torch.optim.Optimizer) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def assert_refused(optimizer: Any, tensor: str | None, match: str) -> MaskError:
    """By each call that would read the second parameter; the first one has not moved then."""
    first = optimizer.param_groups[0]["params"][0]
    before, state = first.detach().clone(), copy.deepcopy(optimizer.state[first])
    with pytest.raises(MaskError, match=match) as caught:
        optimizer.step()
    assert caught.value.tensor == tensor and caught.value.expected and caught.value.found
    assert torch.equal(first, before)
    assert optimizer.state[first].get("step") == state.get("step")
    return caught.value


@each
def test_masks_of_another_model(kind: str) -> None:
    (parameters, _), (_, others) = two(), two()
    for make in (KINDS[kind], lambda p, m: freeze_outside(torch.optim.SGD(p), m)):
        with pytest.raises(MaskError, match="nothing to train") as caught:
            make(parameters, others)
        assert "up.weight" in str(caught.value.expected)


@each
def test_masks_of_other_shapes(kind: str) -> None:
    parameters, masks = two()
    parameters[1].data = torch.ones(4, 3)
    for make in (KINDS[kind], lambda p, m: freeze_outside(torch.optim.SGD(p), m)):
        with pytest.raises(MaskError, match="does not fit") as caught:
            make(parameters, masks)
        assert caught.value.tensor == "down.weight"
        assert "(4, 3)" in str(caught.value.expected) and caught.value.found == (3, 4)


@each
def test_without_names_a_parameter_is_called_by_its_place(kind: str) -> None:
    parameters, masks = two()
    optimizer = KINDS[kind](parameters, dict(masks))
    step(optimizer)
    parameters[1].data = torch.ones(1, 4)
    assert_refused(optimizer, "parameter 1", "was moved, cast or sharded")
    named = KINDS[kind]([("lm_head", parameters[0])], dict(masks))
    parameters[0].data = torch.ones(1, 4)
    assert_refused(named, "lm_head", "was moved, cast or sharded")


@each
def test_an_optimizer_that_was_stepped_before_there_were_masks(kind: str) -> None:
    parameters, masks = two()
    before = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[kind](parameters, lr=0.1)
    before.param_groups[0]["momentum"] = 0.9
    step(before)
    optimizer = KINDS[kind](parameters, masks)
    with pytest.raises(MaskError, match="belongs to other masks") as caught:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": before.state_dict()["state"]})
    assert caught.value.tensor == "up.weight" and "without masks" in str(caught.value.found)


@each
def test_masks_that_change_do_not_reach_what_is_trained(kind: str) -> None:
    parameters, masks = two()
    given = dict(masks)
    optimizer = KINDS[kind](parameters, given)
    step(optimizer)
    with pytest.raises(ValueError, match="read-only"):
        given[parameters[0]].bits[:] = 255
    given[parameters[0]] = given[parameters[0]].inverted()
    step(optimizer)
    assert (parameters[0] != 1).numpy().tolist() == np.eye(3, 4, dtype=bool).tolist()
    again = KINDS[kind](parameters, given)
    with pytest.raises(MaskError, match="belongs to other masks") as caught:
        again.load_state_dict(optimizer.state_dict())
    assert caught.value.found == "one of other masks"


@each
@pytest.mark.parametrize("transposed", [False, True])
def test_a_parameter_on_another_device(kind: str, transposed: bool) -> None:
    parameters, masks = two(transposed)
    optimizer = KINDS[kind](parameters, masks)
    step(optimizer)
    moved = torch.nn.Parameter(parameters[1].detach().to("meta"))
    parameters[1].grad = None
    torch.utils.swap_tensors(parameters[1], moved)
    parameters[1].grad = torch.ones(3, 4, device="meta")
    error = assert_refused(optimizer, "down.weight", "was moved, cast or sharded")
    assert "on meta" in str(error.found)


@each
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.to("meta"),
        lambda state: state.double(),
        lambda state: state[:2],
        lambda state: torch.ones(6)[::2],
        lambda state: 5.0,
    ],
)
def test_state_that_does_not_fit_the_mask(kind: str, transposed: bool, change: Callable[[Any], Any]) -> None:
    parameters, masks = two(transposed)
    optimizer = KINDS[kind](parameters, masks)
    step(optimizer)
    state = optimizer.state[parameters[1]]
    state[SLOT[kind]] = change(state[SLOT[kind]])
    error = assert_refused(optimizer, "down.weight", f"state {SLOT[kind]} does not fit")
    assert "(3,)" in str(error.expected)


@each
def test_a_loaded_state_of_another_size(kind: str) -> None:
    parameters, masks = two()
    optimizer = KINDS[kind](parameters, masks)
    step(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1][SLOT[kind]] = torch.ones(7)
    with pytest.raises(MaskError, match="does not fit") as caught:
        optimizer.load_state_dict(saved)
    assert caught.value.tensor == "down.weight" and "(7,)" in str(caught.value.found)


@each
def test_a_loaded_state_of_another_precision_is_taken_over(kind: str) -> None:
    parameters, masks = two()
    optimizer = KINDS[kind](parameters, masks)
    step(optimizer)
    wide = [torch.nn.Parameter(parameter.detach().double()) for parameter in parameters]
    mask = masks[parameters[0]]
    other = KINDS[kind](wide, dict.fromkeys(wide, mask))
    other.load_state_dict(optimizer.state_dict())
    step(other)
    step(optimizer)
    torch.testing.assert_close(wide[0].float(), parameters[0])
    assert other.state[wide[0]][SLOT[kind]].dtype == torch.float64


@each
def test_a_gradient_of_another_size(kind: str) -> None:
    parameters, masks = two()
    optimizer = KINDS[kind](parameters, masks)
    step(optimizer)
    parameters[1].data = torch.ones(1, 4)
    parameters[1].grad = torch.ones(1, 4)
    parameters[1].data = torch.ones(3, 4)
    assert_refused(optimizer, "down.weight", "gradient is not that of its parameter")


@each
def test_a_parameter_that_took_the_place_of_another(kind: str) -> None:
    parameters, masks = two()
    optimizer = KINDS[kind](parameters, masks)
    step(optimizer)
    optimizer.param_groups[0]["params"][1] = torch.nn.Parameter(torch.ones(3, 4))
    optimizer.param_groups[0]["params"][1].grad = torch.ones(3, 4)
    error = assert_refused(optimizer, None, "took the place of another")
    assert "(3, 4)" in str(error.found)


@each
@pytest.mark.parametrize("transposed", [False, True])
def test_a_count_of_steps_of_another_dtype_goes_on(kind: str, transposed: bool) -> None:
    (parameters, masks), (others, same) = two(transposed), two(transposed)
    optimizer, plain = KINDS[kind](parameters, masks), KINDS[kind](others, same)
    for turn in range(3):
        step(optimizer)
        step(plain)
        assert int(optimizer.state[parameters[1]]["step"]) == turn + 1
        optimizer.state[parameters[1]]["step"] = torch.tensor(turn + 1, dtype=torch.int64)
    assert torch.equal(parameters[1], others[1])
