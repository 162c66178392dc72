"""Places of whole checkpoints: what all names together tell of one."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptdiff.checkpoint import locate, locate_all


def layers(shapes: dict[str, tuple[int, ...]]) -> list[tuple[str, int | None]]:
    return [(place.tower, place.layer) for place in locate_all(shapes).values()]


def test_a_few_shards_of_a_plain_model_keep_their_numbers() -> None:
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (12, 10, 31)]
    assert layers(dict.fromkeys(names, (8, 8))) == [("language", 12), ("language", 10), ("language", 31)]


def test_what_lies_beside_the_largest_stack_does_not_shift_it() -> None:
    names = [
        *(f"mtp.layers.{layer}.fc1.weight" for layer in range(2)),
        *(f"layers.{layer}.fc1.weight" for layer in range(5)),
    ]
    assert [layer for _, layer in layers(dict.fromkeys(names, (8, 8)))] == [5, 6, 0, 1, 2, 3, 4]


def test_a_bias_belongs_to_a_convolution_as_its_weight_does() -> None:
    places = locate_all({"x.weight": (4, 3, 3, 3), "x.bias": (4,), "y.weight": (4,)})
    assert [place.block for place in places.values()] == ["conv", "conv", "other"]


@pytest.mark.parametrize(
    ("kernel", "tower"), [((8, 3, 4, 4), "vision"), ((8, 1, 4, 4), "audio"), ((8, 3, 2, 4, 4), "vision")]
)
def test_channels_tell_images_from_sound(kernel: tuple[int, ...], tower: str) -> None:
    shapes = {
        "embeddings.patch_embeddings.projection.weight": kernel,
        "encoder.layer.0.attention.attention.query.weight": (8, 8),
        "layernorm.weight": (8,),
    }
    assert {place.tower for place in locate_all(shapes).values()} == {tower}
    # With words beside them, they are what their own names say.
    shapes["embeddings.word_embeddings.weight"] = (64, 8)
    assert {place.tower for place in locate_all(shapes).values()} == {"language"}


def test_words_inside_a_layer_are_no_tower() -> None:
    shapes = {
        "language_model.layers.0.mlp.vision_moe.gate.weight": (8, 8),
        "vision_tower.blocks.0.mlp.fc1.weight": (8, 8),
    }
    assert layers(shapes) == [("language", 0), ("vision", 0)]


_PART = st.sampled_from(
    ["layers", "stages", "blocks", "block", "encoder", "decoder", "visual", "mlp", "0", "1", "2", "w"]
)
_NAMES = st.lists(st.lists(_PART, min_size=1, max_size=6).map(".".join), unique=True, max_size=12)


@given(_NAMES, st.integers(0, 1000))
def test_the_order_of_names_does_not_matter(names: list[str], seed: int) -> None:
    mixed = random.Random(seed).sample(names, len(names))
    assert locate_all(dict.fromkeys(names, (2, 2))) == locate_all(dict.fromkeys(mixed, (2, 2)))


@given(_NAMES)
def test_every_name_has_its_place(names: list[str]) -> None:
    places = locate_all(dict.fromkeys(names, (2, 2)))
    assert list(places) == names
    for name, place in places.items():
        assert place.module_type == locate(name, 2).module_type or place.module_type == "head"
