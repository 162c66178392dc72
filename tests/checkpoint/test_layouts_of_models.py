"""Both layouts that transformers writes of a model: each tensor of one is made of those of the other."""

import assembled_values
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import ckptdiff
from ckptdiff.checkpoint.layouts import assemble, reopened
from ckptdiff.checkpoint.matching import match_names

TEXT = {
    "vocab_size": 32, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 6, "max_position_embeddings": 32,
}  # fmt: skip
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 10}
LATENT = {
    "q_lora_rank": 6, "kv_lora_rank": 6, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6,
    "n_routed_experts": 3, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
IMAGE = {
    "image_size": 8, "patch_size": 4, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip
STAGES = {
    "image_size": 16, "patch_size": 4, "embed_dim": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_heads": [2, 2],
    "window_size": 2, "num_encoder_blocks": 2, "sr_ratios": [2, 1], "num_attention_heads": [1, 2],
    "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2],
}  # fmt: skip
MODELS = {
    "qwen3_moe": ("Qwen3Moe", "ForCausalLM", TEXT | EXPERTS),
    "qwen2_moe": ("Qwen2Moe", "ForCausalLM", TEXT | EXPERTS | {"shared_expert_intermediate_size": 8}),
    "olmoe": ("Olmoe", "ForCausalLM", TEXT | {"num_experts": 3, "num_experts_per_tok": 2}),
    "mixtral": ("Mixtral", "ForCausalLM", TEXT | {"num_local_experts": 3}),
    "phimoe": ("Phimoe", "ForCausalLM", TEXT | {"num_local_experts": 3}),
    "minimax": ("MiniMax", "ForCausalLM", TEXT | {"num_local_experts": 3, "layer_types": ["full_attention"] * 2}),
    "deepseek_v3": ("DeepseekV3", "ForCausalLM", TEXT | EXPERTS | LATENT),
    "glm4_moe": ("Glm4Moe", "ForCausalLM", TEXT | EXPERTS | LATENT),
    "granitemoe": ("GraniteMoe", "ForCausalLM", TEXT | {"num_local_experts": 3}),
    "jamba": ("Jamba", "ForCausalLM", TEXT | {
        "num_experts": 3, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2,
        "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4}),
    "lfm2_moe": ("Lfm2Moe", "ForCausalLM", TEXT | EXPERTS | {
        "num_dense_layers": 1, "layer_types": ["full_attention", "conv"]}),
    "nemotron_h": ("NemotronH", "ForCausalLM", TEXT | {
        "layers_block_type": ["mamba", "moe", "attention"], "n_routed_experts": 3, "num_experts_per_tok": 2,
        "moe_intermediate_size": 10, "mamba_num_heads": 2, "mamba_head_dim": 12, "ssm_state_size": 4, "n_groups": 1,
        "moe_shared_expert_intermediate_size": 8}),
    "gpt_neox": ("GPTNeoX", "ForCausalLM", TEXT),
    "vit": ("ViT", "Model", IMAGE),
    "beit": ("Beit", "Model", IMAGE),
    "dinov2": ("Dinov2", "Model", IMAGE | {"use_swiglu_ffn": True}),
    "swin": ("Swin", "Model", STAGES),
    "segformer": ("Segformer", "Model", STAGES),
}  # fmt: skip


def saved(folder, model):
    """Two folders with the same weights: names as they were published, and those of the modules."""
    for name, original in (("published", True), ("modules", False)):
        model.save_pretrained(folder / name, save_original_format=original)
    return folder / "published", folder / "modules"


def compare(base, tuned, sides):
    """Match names, put together what is left, and look at values."""
    matched, _ = match_names(base, tuned)
    again = reopened([(base[one], tuned[other]) for one, other in matched.items()])
    by_name = {one: other for one, other in matched.items() if one not in again}
    left = {name: source for name, source in base.items() if name not in by_name}
    theirs = {name: source for name, source in tuned.items() if name not in by_name.values()}
    assembly = assemble(left, theirs)
    assert [warning for warning in assembly.warnings if "GPT-OSS" not in warning] == []
    assembled_values.check(assembly, {name: sides[0][name] for name in left}, {name: sides[1][name] for name in theirs})
    for one, other in by_name.items():
        np.testing.assert_array_equal(sides[0][one], sides[1][other])
    return assembly


def drawn(model):
    """The model with normal weights: some start as zeros or ones."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("family", MODELS)
def test_both_layouts_of_a_model_are_the_same_weights(tmp_path, family):
    name, head, options = MODELS[family]
    config = getattr(transformers, f"{name}Config")(**options)
    folders = saved(tmp_path, drawn(getattr(transformers, f"{name}{head}")(config)))
    tensors = [ckptdiff.open_checkpoint(folder).tensors for folder in folders]
    values = [load_file(folder / "model.safetensors") for folder in folders]
    assert values[0].keys() != values[1].keys()
    compare(*tensors, values)
    compare(*tensors[::-1], values[::-1])


def test_experts_with_axes_swapped_are_found_although_names_are_the_same():
    # down_proj is square: only gate_up_proj tells that its axes are swapped. Saved, they are as in the model.
    text = TEXT | EXPERTS | {"moe_intermediate_size": 12, "pad_token_id": 0}
    vision = {"depth": 1, "hidden_size": 12, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": 12}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    model = drawn(transformers.Qwen3VLMoeForConditionalGeneration(config))
    here = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    there = {name: array.swapaxes(1, 2) if ".experts." in name else array for name, array in here.items()}
    down = "model.language_model.layers.1.mlp.experts.down_proj"
    assert here[down].shape == there[down].shape
    for sides in ((here, there), (there, here)):
        found = compare(*map(assembled_values.described, sides), sides)
        assert [piece.transposed for piece in found.assembled[down].pieces] == [True]
        assert len(found.assembled) == 4 and not found.renamed


def fused_and_split(model, cut):
    """A model's state, and the same cut by NumPy: what transformers has no rule for."""
    fused = {name: tensor.numpy() for name, tensor in drawn(model).state_dict().items()}
    parts = {}
    for name, array in fused.items():
        parts |= cut(name, array) or {name: array}
    assert fused.keys() != parts.keys()
    for sides in ((fused, parts), (parts, fused)):
        yield compare(*map(assembled_values.described, sides), sides)


def of_experts(name, arrays, leaf):
    inside, _, _ = name.rpartition("experts.")
    return {
        f"{inside}experts.{expert}.{part}.{leaf}": array
        for part, stack in arrays.items()
        for expert, array in enumerate(stack)
    }


def cut_gpt_oss(name, array):
    if name.endswith("gate_up_proj"):
        columns = array.swapaxes(1, 2)
        return of_experts(name, {"gate_proj": columns[:, ::2], "up_proj": columns[:, 1::2]}, "weight")
    if name.endswith("gate_up_proj_bias"):
        return of_experts(name, {"gate_proj": array[..., ::2], "up_proj": array[..., 1::2]}, "bias")
    if name.endswith("experts.down_proj"):
        return of_experts(name, {"down_proj": array.swapaxes(1, 2)}, "weight")
    if name.endswith("experts.down_proj_bias"):
        return of_experts(name, {"down_proj": array}, "bias")
    return None


def cut_llama4(name, array):
    if name.endswith("experts.gate_up_proj"):
        gate, up = np.split(array.swapaxes(1, 2), 2, axis=1)
        return of_experts(name, {"gate_proj": gate, "up_proj": up}, "weight")
    if name.endswith("experts.down_proj"):
        return of_experts(name, {"down_proj": array.swapaxes(1, 2)}, "weight")
    return None


def cut_phi3(name, array):
    if "gate_up_proj" in name:
        gate, up = np.split(array, 2)
        return {name.replace("gate_up_proj", "gate_proj"): gate, name.replace("gate_up_proj", "up_proj"): up}
    if "qkv_proj" in name:
        q, k, v = np.split(array, [12, 18])
        return {name.replace("qkv", letter): part for letter, part in (("q", q), ("k", k), ("v", v))}
    return None


def cut_gpt2(name, array):
    """As linear layers, with q, k and v one by one."""
    if "c_attn" in name:
        parts = zip("qkv", np.split(array.T, 3), strict=True)
        return {name.replace("c_attn", f"{letter}_proj"): part for letter, part in parts}
    return {name: array.T} if "c_proj" in name or "c_fc" in name else None


UNCONVERTED = {
    "gpt_oss": ("GptOss", "ForCausalLM", TEXT | {"num_local_experts": 3, "intermediate_size": 12}, cut_gpt_oss),
    "llama4": ("Llama4", "ForCausalLM", TEXT | {
        "num_local_experts": 3, "intermediate_size": 6, "intermediate_size_mlp": 20, "moe_layers": [0, 1]}, cut_llama4),
    "phi3": ("Phi3", "ForCausalLM", TEXT | {"pad_token_id": 0}, cut_phi3),
    "glm4": ("Glm4", "ForCausalLM", TEXT | {"pad_token_id": 0}, cut_phi3),
    "gpt2": ("GPT2", "LMHeadModel", {"vocab_size": 32, "n_embd": 12, "n_layer": 2, "n_head": 2}, cut_gpt2),
}  # fmt: skip


@pytest.mark.parametrize("family", UNCONVERTED)
def test_models_that_transformers_does_not_convert(family):
    name, head, options, cut = UNCONVERTED[family]
    config = getattr(transformers, f"{name}{'Text' if family == 'llama4' else ''}Config")(**options)
    for assembly in fused_and_split(getattr(transformers, f"{name}{head}")(config), cut):
        assert assembly.assembled
