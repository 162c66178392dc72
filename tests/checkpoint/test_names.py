import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptdiff.checkpoint import Place, locate, names
from ckptdiff.checkpoint.families import BLOCK_OF_MODULE
from ckptdiff.checkpoint.names import split_numbers

# (name, layer, module type), by the family whose published checkpoints use the name.
LANGUAGE = {
    "llama, qwen, mistral, gemma": [
        ("model.embed_tokens.weight", None, "embed_tokens"),
        ("model.layers.0.self_attn.q_proj.weight", 0, "q_proj"),
        ("model.layers.11.self_attn.k_proj.bias", 11, "k_proj"),
        ("model.layers.11.self_attn.v_proj.weight", 11, "v_proj"),
        ("model.layers.127.self_attn.o_proj.weight", 127, "o_proj"),
        ("model.layers.3.self_attn.q_norm.weight", 3, "norm"),
        ("model.layers.3.self_attn.k_norm.weight", 3, "norm"),
        ("model.layers.3.self_attn.rotary_emb.inv_freq", 3, "other"),
        ("model.layers.3.mlp.gate_proj.weight", 3, "gate_proj"),
        ("model.layers.3.mlp.up_proj.weight", 3, "up_proj"),
        ("model.layers.3.mlp.down_proj.weight", 3, "down_proj"),
        ("model.layers.3.input_layernorm.weight", 3, "norm"),
        ("model.layers.3.post_feedforward_layernorm.weight", 3, "norm"),
        ("model.norm.weight", None, "norm"),
        ("lm_head.weight", None, "lm_head"),
    ],
    "llama, as its authors name it": [
        ("tok_embeddings.weight", None, "embed_tokens"),
        ("layers.2.attention.wq.weight", 2, "q_proj"),
        ("layers.2.attention.wk.weight", 2, "k_proj"),
        ("layers.2.attention.wv.weight", 2, "v_proj"),
        ("layers.2.attention.wo.weight", 2, "o_proj"),
        ("layers.2.feed_forward.w1.weight", 2, "gate_proj"),
        ("layers.2.feed_forward.w2.weight", 2, "down_proj"),
        ("layers.2.feed_forward.w3.weight", 2, "up_proj"),
        ("layers.2.attention_norm.weight", 2, "norm"),
        ("layers.2.ffn_norm.weight", 2, "norm"),
        ("norm.weight", None, "norm"),
        ("output.weight", None, "lm_head"),
    ],
    "phi": [
        ("model.layers.4.self_attn.qkv_proj.weight", 4, "qkv_proj"),
        ("model.layers.4.mlp.gate_up_proj.weight", 4, "gate_up_proj"),
        ("model.layers.4.self_attn.dense.weight", 4, "o_proj"),
        ("model.layers.4.mlp.fc1.weight", 4, "up_proj"),
        ("model.layers.4.mlp.fc2.bias", 4, "down_proj"),
        ("model.final_layernorm.weight", None, "norm"),
    ],
    "gpt-2": [
        ("transformer.wte.weight", None, "embed_tokens"),
        ("wpe.weight", None, "embed_tokens"),
        ("h.5.ln_1.weight", 5, "norm"),
        ("transformer.h.5.attn.c_attn.weight", 5, "qkv_proj"),
        ("transformer.h.5.attn.c_proj.bias", 5, "o_proj"),
        ("h.5.mlp.c_fc.weight", 5, "up_proj"),
        ("h.5.mlp.c_proj.weight", 5, "down_proj"),
        ("h.5.attn.bias", 5, "other"),
        ("h.5.attn.masked_bias", 5, "other"),
        ("transformer.h.5.crossattention.q_attn.weight", 5, "q_proj"),
        ("ln_f.bias", None, "norm"),
    ],
    "gpt-j": [
        ("transformer.h.0.attn.out_proj.weight", 0, "o_proj"),
        ("transformer.h.0.mlp.fc_in.bias", 0, "up_proj"),
        ("transformer.h.0.mlp.fc_out.weight", 0, "down_proj"),
    ],
    "gpt-neox, pythia": [
        ("gpt_neox.embed_in.weight", None, "embed_tokens"),
        ("gpt_neox.layers.1.attention.query_key_value.weight", 1, "qkv_proj"),
        ("gpt_neox.layers.1.attention.dense.weight", 1, "o_proj"),
        ("gpt_neox.layers.1.attention.bias", 1, "other"),
        ("gpt_neox.layers.1.attention.rotary_emb.inv_freq", 1, "other"),
        ("gpt_neox.layers.1.mlp.dense_h_to_4h.weight", 1, "up_proj"),
        ("gpt_neox.layers.1.mlp.dense_4h_to_h.bias", 1, "down_proj"),
        ("embed_out.weight", None, "lm_head"),
    ],
    "falcon, bloom": [
        ("transformer.word_embeddings.weight", None, "embed_tokens"),
        ("word_embeddings_layernorm.weight", None, "norm"),
        ("transformer.h.1.self_attention.query_key_value.weight", 1, "qkv_proj"),
        ("h.1.self_attention.dense.weight", 1, "o_proj"),
        ("h.1.mlp.dense_h_to_4h.weight", 1, "up_proj"),
    ],
    "opt": [
        ("model.decoder.embed_tokens.weight", None, "embed_tokens"),
        ("model.decoder.embed_positions.weight", None, "embed_tokens"),
        ("model.decoder.layers.7.self_attn.out_proj.weight", 7, "o_proj"),
        ("model.decoder.layers.7.fc1.weight", 7, "up_proj"),
        ("model.decoder.layers.7.fc2.bias", 7, "down_proj"),
        ("model.decoder.layers.7.self_attn_layer_norm.weight", 7, "norm"),
    ],
    "bert": [
        ("bert.embeddings.word_embeddings.weight", None, "embed_tokens"),
        ("embeddings.position_embeddings.weight", None, "embed_tokens"),
        ("embeddings.token_type_embeddings.weight", None, "embed_tokens"),
        ("embeddings.position_ids", None, "embed_tokens"),
        ("embeddings.LayerNorm.gamma", None, "norm"),
        ("encoder.layer.5.attention.self.query.weight", 5, "q_proj"),
        ("encoder.layer.5.attention.self.key.bias", 5, "k_proj"),
        ("encoder.layer.5.attention.self.value.weight", 5, "v_proj"),
        ("encoder.layer.5.attention.output.dense.weight", 5, "o_proj"),
        ("encoder.layer.5.attention.output.LayerNorm.weight", 5, "norm"),
        ("encoder.layer.5.intermediate.dense.weight", 5, "up_proj"),
        ("encoder.layer.5.output.dense.bias", 5, "down_proj"),
        ("encoder.layer.5.output.LayerNorm.bias", 5, "norm"),
        ("pooler.dense.weight", None, "head"),
        ("cls.predictions.decoder.weight", None, "lm_head"),
        ("cls.predictions.transform.dense.weight", None, "head"),
        ("lm_head.dense.weight", None, "lm_head"),
        ("lm_head.layer_norm.weight", None, "norm"),
        ("classifier.weight", None, "head"),
    ],
    "distilbert, modernbert": [
        ("distilbert.transformer.layer.0.attention.q_lin.weight", 0, "q_proj"),
        ("distilbert.transformer.layer.0.attention.out_lin.weight", 0, "o_proj"),
        ("distilbert.transformer.layer.0.ffn.lin1.weight", 0, "up_proj"),
        ("distilbert.transformer.layer.0.ffn.lin2.weight", 0, "down_proj"),
        ("vocab_projector.weight", None, "lm_head"),
        ("model.layers.0.attn.Wqkv.weight", 0, "qkv_proj"),
        ("model.layers.0.attn.Wo.weight", 0, "o_proj"),
        ("model.layers.0.mlp.Wi.weight", 0, "gate_up_proj"),
        ("model.layers.0.mlp.Wo.weight", 0, "down_proj"),
    ],
    "t5": [
        ("shared.weight", None, "embed_tokens"),
        ("encoder.embed_tokens.weight", None, "embed_tokens"),
        ("encoder.block.9.layer.0.SelfAttention.q.weight", 9, "q_proj"),
        ("encoder.block.9.layer.0.SelfAttention.k.weight", 9, "k_proj"),
        ("encoder.block.9.layer.0.SelfAttention.o.weight", 9, "o_proj"),
        ("decoder.block.9.layer.1.EncDecAttention.v.weight", 9, "v_proj"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 0, "attention"),
        ("encoder.block.9.layer.1.DenseReluDense.wi_0.weight", 9, "gate_proj"),
        ("encoder.block.9.layer.1.DenseReluDense.wi_1.weight", 9, "up_proj"),
        ("encoder.block.9.layer.1.DenseReluDense.wi.weight", 9, "up_proj"),
        ("encoder.block.9.layer.1.DenseReluDense.wo.weight", 9, "down_proj"),
        ("encoder.block.9.layer.0.layer_norm.weight", 9, "norm"),
        ("encoder.final_layer_norm.weight", None, "norm"),
    ],
    "switch, pix2struct": [
        ("encoder.block.0.layer.1.mlp.wi.weight", 0, "up_proj"),
        ("encoder.block.0.layer.1.mlp.wo.weight", 0, "down_proj"),
        ("encoder.block.1.layer.1.mlp.experts.expert_7.wi.weight", 1, "up_proj"),
        ("encoder.block.1.layer.1.mlp.experts.expert_7.wo.weight", 1, "down_proj"),
        ("encoder.block.1.layer.1.mlp.router.classifier.weight", 1, "router"),
        ("encoder.encoder.layer.2.mlp.wi_0.weight", 2, "gate_proj"),
        ("encoder.encoder.layer.2.mlp.wi_1.weight", 2, "up_proj"),
        ("decoder.layer.2.mlp.DenseReluDense.wo.weight", 2, "down_proj"),
    ],
    "a stable diffusion unet": [
        ("down_blocks.0.attentions.1.norm.weight", None, "norm"),
        ("down_blocks.0.attentions.1.proj_in.weight", None, "attention"),
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.weight", None, "q_proj"),
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0.bias", None, "o_proj"),
        ("down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj.weight", None, "gate_up_proj"),
        ("down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj.bias", None, "gate_up_proj"),
        ("down_blocks.0.attentions.1.transformer_blocks.0.ff.net.2.weight", None, "down_proj"),
        ("down_blocks.0.attentions.1.transformer_blocks.0.norm3.weight", None, "norm"),
        ("mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.lora_A.weight", None, "gate_up_proj"),
        ("up_blocks.1.temp_attentions.0.transformer_blocks.0.ff.net.2.bias", None, "down_proj"),
        ("up_blocks.1.motion_modules.0.transformer_blocks.0.ff.net.0.proj.weight", None, "gate_up_proj"),
        ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight", None, "gate_up_proj"),
        ("time_embedding.linear_1.weight", None, "embed_tokens"),
        ("mid_block.resnets.0.time_emb_proj.weight", None, "embed_proj"),
    ],
    "transformers of diffusers": [
        ("transformer_blocks.3.attn.to_k.weight", None, "k_proj"),
        ("transformer_blocks.3.ff.net.0.proj.weight", None, "up_proj"),
        ("transformer_blocks.3.ff.net.2.weight", None, "down_proj"),
        ("transformer_blocks.3.ff_context.net.0.proj.weight", None, "up_proj"),
        ("transformer_blocks.3.ff_context.net.2.bias", None, "down_proj"),
        ("blocks.3.ffn.net.0.proj.weight", 3, "up_proj"),
        ("blocks.3.ffn.net.2.weight", 3, "down_proj"),
        ("single_transformer_blocks.3.proj_mlp.weight", None, "up_proj"),
        ("classifier.net.0.proj.weight", None, "head"),
        ("classifier.net.2.weight", None, "head"),
    ],
    "mamba, rwkv": [
        ("backbone.embeddings.weight", None, "embed_tokens"),
        ("backbone.layers.2.mixer.in_proj.weight", 2, "in_proj"),
        ("backbone.layers.2.mixer.out_proj.weight", 2, "out_proj"),
        ("backbone.layers.2.mixer.x_proj.weight", 2, "mixer"),
        ("backbone.layers.2.mixer.dt_proj.bias", 2, "mixer"),
        ("backbone.layers.2.mixer.conv1d.weight", 2, "mixer"),
        ("backbone.layers.2.mixer.A_log", 2, "mixer"),
        ("backbone.layers.2.mixer.dt_bias", 2, "mixer"),
        ("backbone.norm_f.weight", None, "norm"),
        ("rwkv.blocks.2.attention.key.weight", 2, "in_proj"),
        ("rwkv.blocks.2.feed_forward.key.weight", 2, "up_proj"),
    ],
    "qwen, first generation": [
        ("transformer.h.1.mlp.w1.weight", 1, "up_proj"),
        ("transformer.h.1.mlp.w2.weight", 1, "gate_proj"),
        ("transformer.h.1.mlp.c_proj.weight", 1, "down_proj"),
    ],
    "mixtral, dbrx, granite": [
        ("model.layers.1.block_sparse_moe.gate.weight", 1, "router"),
        ("model.layers.1.block_sparse_moe.experts.7.w1.weight", 1, "gate_proj"),
        ("model.layers.1.block_sparse_moe.experts.7.w2.weight", 1, "down_proj"),
        ("model.layers.1.block_sparse_moe.experts.7.w3.weight", 1, "up_proj"),
        ("transformer.blocks.1.ffn.experts.mlp.v1", 1, "up_proj"),
        ("transformer.blocks.1.ffn.router.layer.weight", 1, "router"),
        ("model.layers.1.block_sparse_moe.input_linear.weight", 1, "gate_up_proj"),
        ("model.layers.1.block_sparse_moe.output_linear.weight", 1, "down_proj"),
    ],
    "qwen-moe, deepseek": [
        ("model.layers.1.mlp.gate.weight", 1, "router"),
        ("model.layers.1.mlp.gate.e_score_correction_bias", 1, "router"),
        ("model.layers.1.mlp.shared_expert_gate.weight", 1, "router"),
        ("model.layers.1.mlp.experts.63.gate_proj.weight", 1, "gate_proj"),
        ("model.layers.1.mlp.shared_expert.down_proj.weight", 1, "down_proj"),
        ("model.layers.1.mlp.shared_experts.up_proj.weight", 1, "up_proj"),
        ("model.layers.1.self_attn.q_a_proj.weight", 1, "q_proj"),
        ("model.layers.1.self_attn.q_a_layernorm.weight", 1, "norm"),
        ("model.layers.1.self_attn.q_b_proj.weight_scale_inv", 1, "q_proj"),
        ("model.layers.1.self_attn.kv_a_proj_with_mqa.weight", 1, "kv_proj"),
        ("model.layers.1.self_attn.kv_b_proj.weight", 1, "kv_proj"),
        ("model.layers.1.linear_attn.in_proj_qkvz.weight", 1, "qkv_proj"),
    ],
    "attention with more than attention in it": [
        ("model.layers.1.self_attn.gate_proj.weight", 1, "attention"),
        ("model.layers.1.self_attn.compressor.gate_proj.weight", 1, "attention"),
        ("model.layers.1.self_attn.rel_logits_proj.proj", 1, "attention"),
        ("model.layers.1.self_attention.experts.input_linear.weight", 1, "q_proj"),
        ("model.layers.1.self_attention.experts.output_linear.weight", 1, "o_proj"),
        ("model.layers.1.self_attention.experts.router.layer.weight", 1, "router"),
        ("model.layers.1.mlp.input_linear.weight", 1, "gate_up_proj"),
        ("model.layers.1.shared_mlp.output_linear.weight", 1, "down_proj"),
        ("encoder.input_linear.weight", None, "embed_proj"),
        ("model.gated_cross_attn_layers.1.mlp.up_proj.weight", None, "up_proj"),
        ("model.gated_cross_attn_layers.1.cross_attn.o_proj.weight", None, "o_proj"),
        ("local_feature_transformer.layers.1.self_attention.mlp.fc1.weight", 1, "up_proj"),
        ("mobilebert.encoder.layer.1.bottleneck.attention.dense.weight", 1, "ffn"),
        ("mobilebert.encoder.layer.1.attention.output.dense.weight", 1, "o_proj"),
        ("transformer.attentions.1.out_lin.weight", None, "o_proj"),
        ("lxmert.encoder.x_layers.1.lang_self_att.output.dense.weight", None, "o_proj"),
        ("lxmert.encoder.x_layers.1.lang_self_att.self.query.weight", None, "q_proj"),
        ("lxmert.encoder.x_layers.1.lang_output.dense.weight", None, "down_proj"),
    ],
    "gates that are routers, and one that is not": [
        ("model.layers.1.mlp.gate.wg.weight", 1, "router"),
        ("model.layers.1.mlp.gate.down_proj.weight", 1, "router"),
        ("model.layers.1.mlp.gate.router_mlp.fc1.bias", 1, "router"),
        ("model.layers.1.feed_forward.gate.weight", 1, "router"),
        ("layers.1.ffn.gate.weight", 1, "router"),
        ("model.layers.1.moe.gate.weight", 1, "router"),
        ("backbone.layers.1.mixer.gate.weight", 1, "router"),
        ("model.decoder.layers.1.gateway.gate.weight", 1, "attention"),
    ],
    "fused experts": [
        ("model.layers.1.mlp.experts.gate_up_proj", 1, "gate_up_proj"),
        ("model.layers.1.mlp.experts.down_proj", 1, "down_proj"),
        ("model.layers.1.mlp.experts.gate_up_proj_blocks", 1, "gate_up_proj"),
        ("model.layers.1.mlp.experts.down_proj_scales", 1, "down_proj"),
        ("model.layers.1.mlp.experts.down_proj_bias", 1, "down_proj"),
        ("model.layers.1.mlp.router.bias", 1, "router"),
        ("model.layers.1.self_attn.sinks", 1, "attention"),
    ],
    "adapters and wrappers": [
        ("base_model.model.model.layers.6.self_attn.q_proj.lora_A.default.weight", 6, "q_proj"),
        ("base_model.model.model.layers.6.mlp.down_proj.lora_B.weight", 6, "down_proj"),
        ("base_model.model.model.layers.6.self_attn.q_proj.base_layer.weight", 6, "q_proj"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", None, "embed_tokens"),
        ("base_model.model.lm_head.modules_to_save.default.weight", None, "lm_head"),
        ("module._orig_mod.model.layers.6.self_attn.v_proj.weight", 6, "v_proj"),
        ("model.layers.6.self_attn.v_proj.qweight", 6, "v_proj"),
    ],
    "no model at all": [
        ("", None, "other"),
        (".", None, "other"),
        ("weight", None, "other"),
        ("encoder.layers.0.w", 0, "other"),
        ("ensemble.0.C.layers.1.weight", 1, "other"),
        ("layers.1x.mlp.up_proj.weight", None, "up_proj"),
        ("a/b\x1b[0m<b>.h.3", 3, "other"),
        ("layers." + "9" * 5000, None, "other"),
    ],
}  # fmt: skip

TOWERS = [
    ("model.visual.blocks.3.attn.qkv.weight", Place(3, "vision", "qkv_proj", "attention")),
    ("visual.blocks.3.attn.proj.bias", Place(3, "vision", "o_proj", "attention")),
    ("visual.blocks.3.mlp.linear_fc1.weight", Place(3, "vision", "up_proj", "ffn")),
    ("visual.patch_embed.proj.weight", Place(None, "vision", "embed_tokens", "embedding")),
    ("visual.merger.mlp.0.weight", Place(None, "projector", "projector", "projector")),
    ("visual.merger.ln_q.weight", Place(None, "projector", "norm", "norm")),
    ("model.visual.deepstack_merger_list.1.norm.weight", Place(None, "projector", "norm", "norm")),
    ("multi_modal_projector.linear_1.weight", Place(None, "projector", "projector", "projector")),
    ("model.multi_modal_projector.linear_1.bias", Place(None, "projector", "projector", "projector")),
    ("model.language_model.layers.3.mlp.up_proj.weight", Place(3, "language", "up_proj", "ffn")),
    ("language_model.model.embed_tokens.weight", Place(None, "language", "embed_tokens", "embedding")),
    ("language_model.lm_head.weight", Place(None, "language", "lm_head", "head")),
    (
        "vision_tower.vision_model.encoder.layers.3.self_attn.out_proj.weight",
        Place(3, "vision", "o_proj", "attention"),
    ),
    ("vision_model.encoder.layers.3.mlp.fc1.weight", Place(3, "vision", "up_proj", "ffn")),
    ("vision_model.pre_layrnorm.weight", Place(None, "vision", "norm", "norm")),
    ("vision_model.embeddings.patch_embedding.weight", Place(None, "vision", "embed_tokens", "embedding")),
    ("vision_model.embeddings.class_embedding", Place(None, "vision", "embed_tokens", "embedding")),
    ("vision_model.head.attention.in_proj_weight", Place(None, "vision", "qkv_proj", "attention")),
    ("text_model.encoder.layers.3.self_attn.q_proj.weight", Place(3, "language", "q_proj", "attention")),
    ("vit.encoder.layer.3.attention.attention.query.weight", Place(3, "vision", "q_proj", "attention")),
    ("vit.embeddings.cls_token", Place(None, "vision", "embed_tokens", "embedding")),
    ("vit.embeddings.patch_embeddings.projection.weight", Place(None, "vision", "embed_tokens", "embedding")),
]


@pytest.mark.parametrize(
    ("name", "layer", "module_type"),
    [row for rows in LANGUAGE.values() for row in rows],
    ids=lambda value: str(value)[:80],
)
def test_names_of_real_models(name, layer, module_type):
    assert locate(name) == Place(layer, "language", module_type, BLOCK_OF_MODULE[module_type])


@pytest.mark.parametrize(("name", "place"), TOWERS)
def test_towers(name, place):
    assert locate(name) == place


def test_blocks():
    blocks = {
        "attention": "q_proj k_proj v_proj kv_proj qkv_proj o_proj attention",
        "ffn": "gate_proj up_proj gate_up_proj down_proj ffn",
        "mixer": "in_proj out_proj mixer",
        "router": "router",
        "conv": "conv",
        "modulation": "modulation",
        "projector": "projector",
        "embedding": "embed_tokens embed_proj",
        "head": "lm_head head",
        "norm": "norm",
        "other": "other",
    }
    assert {module: block for block, text in blocks.items() for module in text.split()} == BLOCK_OF_MODULE


@pytest.mark.parametrize(("ndim", "module_type"), [(None, "router"), (2, "router"), (1, "other"), (0, "other")])
def test_a_gate_that_is_no_matrix_is_no_router(ndim, module_type):
    assert locate("model.layers.0.mlp.gate.weight", ndim).module_type == module_type


def test_a_bias_of_a_router_is_a_vector():
    assert locate("model.layers.0.mlp.gate.bias", 1).module_type == "router"
    assert locate("model.layers.0.mlp.gate.e_score_correction_bias", 1).module_type == "router"


def test_the_names_of_a_mixture_of_experts_are_few_without_their_numbers():
    """Thirty thousand names: a role is worked out once for each module, which keeps that quick."""
    names._role.cache_clear()
    layers = {
        locate(f"model.layers.{layer}.mlp.experts.{expert}.{module}.weight", 2).layer
        for layer in range(40)
        for expert in range(250)
        for module in ("gate_proj", "up_proj", "down_proj")
    }
    assert layers == set(range(40))
    assert names._role.cache_info().misses == 3


def test_the_feed_forward_parts_of_models_as_transformers_builds_them():
    """The names are those of the library, and shapes tell what is right: gate and up together are twice as wide."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"d_model": 8, "d_ff": 40, "d_kv": 4, "num_layers": 2, "num_heads": 2}
    configs = [
        transformers.SwitchTransformersConfig(num_experts=2, **sizes),
        transformers.T5Config(**sizes),
        transformers.T5Config(feed_forward_proj="gated-gelu", **sizes),
        transformers.ModernBertConfig(hidden_size=8, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2),
    ]
    right = {(40, 8): "up_proj", (80, 8): "gate_up_proj", (8, 40): "down_proj"}
    for config in configs:
        with torch.device("meta"):
            tensors = transformers.AutoModel.from_config(config).state_dict()
        found = {name: right[shape] for name, tensor in tensors.items() if (shape := tuple(tensor.shape)) in right}
        assert len(found) >= 4
        for name, module_type in found.items():
            assert locate(name, 2).module_type == ("gate_proj" if "wi_0" in name else module_type), name


@given(st.text(st.sampled_from("ab*.0123٣\n"), max_size=24))
def test_numbers_between_dots_are_split_from_a_name(name):
    form, numbers = split_numbers(name)
    *inner, last = name.split(".")
    are = [part.isascii() and part.isdigit() and len(part) < 10 for part in inner]
    assert form == ".".join([*("*" if is_number else part for part, is_number in zip(inner, are, strict=True)), last])
    assert numbers == tuple(part for part, is_number in zip(inner, are, strict=True) if is_number)
