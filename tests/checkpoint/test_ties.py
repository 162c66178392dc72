from ckptdiff.checkpoint import Shard, TensorInfo
from ckptdiff.checkpoint.ties import tied_embedding, twice_named

SHARD = Shard("a", 1000, 0, 1, 1, "", {})


def tensor(name, start, stop, shape=(2, 4), dtype="BF16"):
    return TensorInfo(name, dtype, shape, SHARD, start, stop)


def test_names_of_one_region():
    tensors = [tensor("a", 0, 16), tensor("b", 16, 32), tensor("c", 0, 16), tensor("d", 0, 16), tensor("e", 0, 8)]
    assert twice_named(tensors) == {"c": "a", "d": "a"}


def test_empty_tensors_have_no_region():
    assert twice_named([tensor("a", 8, 8, (0,)), tensor("b", 8, 8, (0,))]) == {}


def test_a_head_needs_an_embedding_on_both_sides():
    embedding = {"wte.weight": tensor("wte.weight", 0, 16)}
    head = {"lm_head.weight": tensor("lm_head.weight", 16, 32)}
    assert tied_embedding("lm_head.weight", {**embedding, **head}, embedding) == "wte.weight"
    assert tied_embedding("lm_head.weight", head, embedding) is None
    assert tied_embedding("lm_head.weight", {**embedding, **head}, {}) is None
    assert tied_embedding("wte.weight", embedding, embedding) is None
