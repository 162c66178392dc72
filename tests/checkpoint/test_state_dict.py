"""Which part of what a trainer saved is the model."""

import pytest

from ckptdiff.checkpoint.state_dict import find_model
from ckptdiff.errors import CheckpointError


class Tensor:
    """Stands for one."""


A, B, C = Tensor(), Tensor(), Tensor()
OPTIMIZER = {"state": {0: {"exp_avg": C, "step": C}}, "param_groups": [{"lr": 0.1}]}


def find(saved, part=None):
    found = find_model(saved, lambda value: isinstance(value, Tensor), "f.pt", part)
    return dict(found.tensors), found.path, dict(found.left_out)


@pytest.mark.parametrize(
    ("saved", "tensors", "path", "left_out"),
    [
        ({"a.weight": A, "b": B}, {"a.weight": A, "b": B}, (), {}),
        ({"model": {"a": A}, "optimizer": OPTIMIZER, "step": 3}, {"a": A}, ("model",), {"optimizer": 2}),
        ({"state_dict": {"a": A}, "callbacks": {"best": C}, "epoch": 1}, {"a": A}, ("state_dict",), {"callbacks": 1}),
        ({"model": {"module": {"a": A}, "count": 1}}, {"a": A}, ("model", "module"), {}),
        ({"model": {"a": A}, "ema": {"a": B}}, {"a": A}, ("model",), {"ema": 1}),
        ({"model": {"encoder": {"a": A}, "decoder": {"a": B}}}, {"encoder.a": A, "decoder.a": B}, ("model",), {}),
        ({"weights": {"a": A}, "optim": OPTIMIZER}, {"a": A}, ("weights",), {"optim": 2}),
        ({"a": A, "my_opt": OPTIMIZER}, {"a": A}, (), {"my_opt": 2}),
        ({"a": A, "layers": [B, {"c": C}]}, {"a": A, "layers.0": B, "layers.1.c": C}, (), {}),
        ({"a": A, "optimizer": {"x": C}, "rng_state": C, "cuda_rng_state": C}, {"a": A}, (), {
            "optimizer": 1, "rng_state": 1, "cuda_rng_state": 1}),
        ({"model": {"a": A}, "rng_state": C, "step": B}, {"a": A}, ("model",), {"rng_state": 1, "step": 1}),
        ({"step_embedding.weight": A, "optimal.weight": B, "loss_scale.w": C},
         {"step_embedding.weight": A, "optimal.weight": B, "loss_scale.w": C}, (), {}),
        ({"a": A, "b": A}, {"a": A, "b": A}, (), {}),
        ({1: {2: A}}, {"2": A}, ("1",), {}),
    ],
)  # fmt: skip
def test_the_model_is_found(saved, tensors, path, left_out):
    assert find(saved) == (tensors, path, left_out)


def test_what_was_taken_is_said():
    found = find_model({"model": {"a": A}, "ema": {"a": B}, "n": 1}, lambda value: isinstance(value, Tensor), "f.pt")
    assert (
        found.said("f.pt") == "f.pt: its part 'model' is read, and not 'ema' (1 tensor); f.pt#PART names another part"
    )
    assert find_model({"a": A}, lambda value: isinstance(value, Tensor), "f.pt").said("f.pt") is None


@pytest.mark.parametrize(
    ("part", "tensors"),
    [("ema", {"a": B}), ("ema/inner", {"a": B}), ("optimizer/state/0", {"exp_avg": C, "step": C}), ("model", {"a": A})],
)
def test_the_user_names_a_part(part, tensors):
    saved = {"model": {"a": A}, "ema": {"inner": {"a": B}, "decay": 0.9}, "optimizer": OPTIMIZER}
    found = find(saved, part)[0]
    assert found == ({"inner.a": B} if part == "ema" else tensors)


@pytest.mark.parametrize(
    ("saved", "part", "problem", "found"),
    [
        (
            {"teacher": {"a": A}, "student": {"a": B}},
            None,
            "several of its parts may be the model",
            "'teacher', 'student'",
        ),
        ({"model": {"a": A}, "state_dict": {"a": B}}, None, "several of its parts may be", "'model', 'state_dict'"),
        ({"model": {"a": A}}, "ema", "there is no such part", "'ema'"),
        ({"model": {"a": A}}, "model/a/b", "there is no such part", "'model/a/b'"),
        (OPTIMIZER, None, "there are no weights in it", "tensors in 'state' alone"),
        ({"optimizer": OPTIMIZER}, None, "there are no weights in it", "tensors in 'optimizer' alone"),
        ({"epoch": 3}, None, "there are no weights in it", "no tensor"),
        (A, None, "there are no weights in it", "a tensor without a name"),
        ({"a.b": A, "a": {"b": B}}, None, "two tensors have one name", None),
    ],
)
def test_what_cannot_be_told_is_refused(saved, part, problem, found):
    with pytest.raises(CheckpointError, match=problem) as caught:
        find(saved, part)
    assert (caught.value.file, caught.value.found) == ("f.pt", found)


def test_what_holds_itself():
    ring: dict = {"a": {}}
    ring["a"]["b"] = ring
    with pytest.raises(CheckpointError, match="nested too deeply"):
        find(ring)
    many: object = 1
    for _ in range(19):
        many = [many] * 10
    with pytest.raises(CheckpointError, match="nested too deeply"):
        find_model({"a": many}, lambda value: isinstance(value, Tensor), "f.pt", most=10_000)
