"""Names of real models: next to nothing is "other", no two layers are one, and what a person calls it holds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import pytest

from ckptdiff.checkpoint import Place, locate_all

from models import MODELS, build  # isort: skip
from module_types import TOWERS, TYPES  # isort: skip

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


class Named(NamedTuple):
    """A model's tensors, and where its layers are."""

    shapes: Mapping[str, tuple[int, ...]]
    places: Mapping[str, Place]
    layers: list[str]


@lru_cache
def named(family: str) -> Named:
    from transformers.modeling_layers import GradientCheckpointingLayer

    model = build(family, device="meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layers = [name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    # A stage of layers may be one to the library too, and the parts of a convolutional front end.
    inner = [name for name in layers if not any(other.startswith(f"{name}.") for other in layers)]
    return Named(shapes, locate_all(shapes), [name for name in inner if "conv_layers" not in name])


def saved(family: str) -> Mapping[str, tuple[int, ...]]:
    """The names that ``save_pretrained`` writes, where they are not the model's own."""
    from transformers.core_model_loading import revert_weight_conversion

    model = build(family, device="meta")
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, model.state_dict()).items()}


def share_of_other(shapes: Mapping[str, tuple[int, ...]]) -> float:
    places = locate_all(shapes)
    other = sum(prod(shapes[name]) for name, place in places.items() if place.block == "other")
    return other / sum(map(prod, shapes.values()))


def test_all_families_have_their_types() -> None:
    assert TYPES.keys() == MODELS.keys() and TOWERS.keys() < MODELS.keys()


@pytest.mark.parametrize("family", MODELS)
def test_hardly_anything_is_other(family: str) -> None:
    assert share_of_other(named(family).shapes) <= 0.01
    assert share_of_other(saved(family)) <= 0.01


@pytest.mark.parametrize("family", MODELS)
def test_modules_are_what_they_are_called(family: str) -> None:
    places = named(family).places
    for pattern, module_type in TYPES[family].items():
        found = {name: place.module_type for name, place in places.items() if fnmatchcase(name, pattern)}
        kept = {name: kind for name, kind in found.items() if ".norm" not in name or module_type == "norm"}
        assert kept, pattern
        assert set(kept.values()) == {module_type}, kept


@pytest.mark.parametrize("family", MODELS)
def test_towers(family: str) -> None:
    places = named(family).places
    for pattern, tower in TOWERS.get(family, {"*": "language"}).items():
        found = {name: place.tower for name, place in places.items() if fnmatchcase(name, pattern)}
        assert found, pattern
        assert set(found.values()) == {tower}, found


@pytest.mark.parametrize("family", MODELS)
def test_no_two_layers_are_one(family: str) -> None:
    """The library says which modules are layers; a layer's tensors have one place, and no other's."""
    known = named(family)
    owners: dict[tuple[str, int | None], str] = {}
    for layer in known.layers:
        keys = {(place.tower, place.layer) for name, place in known.places.items() if name.startswith(f"{layer}.")}
        assert len(keys) == 1, (layer, keys)
        (key,) = keys
        assert key[1] is not None, layer
        assert owners.setdefault(key, layer) == layer


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert_mlm", "vit", "t5", "whisper", "llava", "qwen2_audio"])
def test_layers_of_a_plain_stack_keep_their_number(family: str) -> None:
    for name, place in named(family).places.items():
        if place.layer is not None:
            assert str(place.layer) == re.findall(r"\.([0-9]+)\.", name)[0]


@pytest.mark.parametrize(
    ("family", "stages"),
    [("resnet", [1, 2, 1, 1]), ("convnext", [1, 1, 2, 1]), ("swin", [1, 2]), ("segformer", [1, 2, 1, 1])],
)
def test_layers_are_counted_through_stages(family: str, stages: list[int]) -> None:
    places = named(family).places
    found: dict[int, set[tuple[str, ...]]] = {}
    for name, place in places.items():
        if place.layer is not None:
            found.setdefault(place.layer, set()).add(tuple(re.findall(r"\.([0-9]+)(?=\.)", name)[:2]))
    expected = [(str(stage), str(block)) for stage, blocks in enumerate(stages) for block in range(blocks)]
    assert [found[layer] for layer in sorted(found)] == [{layer} for layer in expected]


class Written(NamedTuple):
    """A model of the table of names."""

    tower: str
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, str]


def expanded(pattern: str) -> Iterator[str]:
    braces = re.search(r"\{([^}]*)\}", pattern)
    if braces is None:
        yield pattern
        return
    ends = re.fullmatch(r"([0-9]+)-([0-9]+)", braces[1])
    for choice in range(int(ends[1]), int(ends[2]) + 1) if ends else braces[1].split(","):
        yield from expanded(f"{pattern[: braces.start()]}{choice}{pattern[braces.end() :]}")


def written() -> dict[str, Written]:
    models: dict[str, Written] = {}
    for line in (Path(__file__).parent / "diffusers_timm.txt").read_text().splitlines():
        if line.startswith("["):
            model, tower = line.strip("[]").split()
            models[model] = Written(tower, {}, {})
        elif line and not line.startswith("#"):
            pattern, shape, module_type = line.split()
            for name in expanded(pattern):
                models[model].shapes[name] = tuple(map(int, shape.split(",")))
                models[model].types[name] = module_type
    return models


@pytest.mark.parametrize("model", written().values(), ids=written())
def test_models_of_diffusers_and_timm(model: Written) -> None:
    places = locate_all(model.shapes)
    assert {name: place.module_type for name, place in places.items()} == model.types
    assert {place.tower for place in places.values()} == {model.tower}
    assert share_of_other(model.shapes) == 0


@pytest.mark.parametrize(
    ("model", "same", "other"),
    [
        ("unet", "down_blocks.1.resnets.0.conv{1,2}.weight", "down_blocks.{0-2}.resnets.{0-1}.conv1.weight"),
        ("unet", "mid_block.resnets.1.conv{1,2}.weight", "up_blocks.{0-3}.resnets.{0-2}.conv1.weight"),
        ("timm_resnet", "layer3.1.conv{1,2}.weight", "layer{1-4}.{0-1}.conv1.weight"),
        ("timm_swin", "layers.1.blocks.0.{attn.qkv,mlp.fc1}.weight", "layers.{0-3}.blocks.{0-1}.mlp.fc1.weight"),
        (
            "flux",
            "transformer_blocks.2.{attn.to_k,norm1.linear}.weight",
            "{single_,}transformer_blocks.{0-3}.attn.to_k.weight",
        ),
    ],
)
def test_layers_of_diffusers_and_timm(model: str, same: str, other: str) -> None:
    places = locate_all(written()[model].shapes)
    assert len({places[name].layer for name in expanded(same)}) == 1
    apart = [places[name].layer for name in expanded(other) if name in places]
    assert len(apart) > 3 and None not in apart and len(set(apart)) == len(apart)


def test_names_of_no_model() -> None:
    """Names that no family has are placed without an error."""
    places = locate_all({"": (), ".": (2,), "layers.0": (2,), "0": (1,), "layers." + "9" * 40 + ".w": (2, 2)})
    assert [place.layer for place in places.values()] == [None] * 5
