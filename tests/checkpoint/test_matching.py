import pytest

from ckptdiff.checkpoint.matching import unwrapped

BARE = "layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "prefix",
    ["", "model.", "module.", "module.model.", "_orig_mod.", "module._orig_mod.model.", "base_model.model.",
     "base_model.model.model.", "model.language_model.", "language_model.", "language_model.model.",
     "model.language_model.model.", "_fsdp_wrapped_module._orig_mod.model."],
)  # fmt: skip
def test_prefixes_around_a_language_model(prefix):
    assert unwrapped(prefix + BARE) == ("language", BARE)


@pytest.mark.parametrize("name", ["model.layers.0._orig_mod.mlp.w", "layers.0._checkpoint_wrapped_module.mlp.w"])
def test_wrappers_around_inner_modules(name):
    assert unwrapped(name) == ("language", "layers.0.mlp.w")


def test_towers_stay_apart():
    assert unwrapped("model.visual.blocks.0.attn.qkv.weight") == unwrapped("visual.blocks.0.attn.qkv.weight")
    assert unwrapped("vision_tower.layers.0.w") != unwrapped("model.layers.0.w")
    assert unwrapped("vision_tower.vision_model.a") == unwrapped("model.vision_tower.vision_model.a")


@pytest.mark.parametrize("name", ["modules.0.w", "remodel.w", "my_module.w", "base_model.w", "model", ""])
def test_other_words_are_no_prefixes(name):
    assert unwrapped(name) == ("language", name)
