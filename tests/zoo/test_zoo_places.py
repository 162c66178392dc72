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

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LLAMA = {
    "*embed_tokens.weight": "embed_tokens",
    "*.self_attn.q_proj.*": "q_proj",
    "*.self_attn.k_proj.*": "k_proj",
    "*.self_attn.v_proj.*": "v_proj",
    "*.self_attn.o_proj.*": "o_proj",
    "*.mlp.gate_proj.*": "gate_proj",
    "*.mlp.up_proj.*": "up_proj",
    "*.mlp.down_proj.*": "down_proj",
    "*input_layernorm.weight": "norm",
    "lm_head.weight": "lm_head",
}
MOE = {
    **{name: LLAMA[name] for name in LLAMA if ".mlp." not in name},
    "*.experts.gate_up_proj*": "gate_up_proj",
    "*.experts.down_proj*": "down_proj",
}
GATE = {**MOE, "*.mlp.gate.weight": "router"}
MAMBA = {
    "backbone.embeddings.weight": "embed_tokens",
    "*.mixer.in_proj.*": "in_proj",
    "*.mixer.out_proj.*": "out_proj",
    "*.mixer.conv1d.*": "mixer",
    "*.mixer.A_log": "mixer",
    "*.mixer.D": "mixer",
}
HYBRID = {name.replace("mixer", "mamba"): kind for name, kind in MAMBA.items() if "mixer" in name}
BERT = {
    "*.embeddings.word_embeddings.weight": "embed_tokens",
    "*.embeddings.position_embeddings.weight": "embed_tokens",
    "*.attention.self.query.*": "q_proj",
    "*.attention.self.key.*": "k_proj",
    "*.attention.self.value.*": "v_proj",
    "*.attention.output.dense.*": "o_proj",
    "*.intermediate.dense.*": "up_proj",
    "*[0-9].output.dense.*": "down_proj",
    "*.LayerNorm.*": "norm",
}
GPT2 = {
    "transformer.wte.weight": "embed_tokens",
    "*.attn.c_attn.*": "qkv_proj",
    "*.attn.c_proj.*": "o_proj",
    "*.mlp.c_fc.*": "up_proj",
    "*.mlp.c_proj.*": "down_proj",
    "transformer.ln_f.*": "norm",
    "lm_head.weight": "lm_head",
}
BART = {
    "model.shared.weight": "embed_tokens",
    "*.self_attn.q_proj.*": "q_proj",
    "*.self_attn.out_proj.*": "o_proj",
    "model.decoder.layers.*.encoder_attn.v_proj.*": "v_proj",
    "*.fc1.*": "up_proj",
    "*.fc2.*": "down_proj",
    "*layer_norm.*": "norm",
    "lm_head.weight": "lm_head",
}
T5 = {
    "shared.weight": "embed_tokens",
    "*.SelfAttention.q.*": "q_proj",
    "*.EncDecAttention.k.*": "k_proj",
    "*.SelfAttention.o.*": "o_proj",
    "*.SelfAttention.relative_attention_bias.*": "attention",
    "*.DenseReluDense.wi.*": "up_proj",
    "*.DenseReluDense.wo.*": "down_proj",
    "*.layer_norm.*": "norm",
}
SIGLIP = {
    "*vision*.embeddings.patch_embedding.*": "embed_tokens",
    "*vision*.self_attn.q_proj.*": "q_proj",
    "*vision*.self_attn.out_proj.*": "o_proj",
    "*vision*.mlp.fc1.*": "up_proj",
    "*vision*.mlp.fc2.*": "down_proj",
    "*vision*.post_layernorm.*": "norm",
}
VIT = {
    "*embeddings.patch_embeddings*weight": "embed_tokens",
    "*embeddings.cls_token": "embed_tokens",
    "*.attention.q_proj.*": "q_proj",
    "*.attention.o_proj.*": "o_proj",
    "*.mlp.fc1.*": "up_proj",
    "*.mlp.fc2.*": "down_proj",
}
QWEN_VL = {
    "model.visual.patch_embed.*": "embed_tokens",
    "model.visual.*.attn.qkv.*": "qkv_proj",
    "model.visual.*.attn.proj.*": "o_proj",
    "model.language_model.*.self_attn.q_proj.*": "q_proj",
}
PROJECTOR = {"*multi_modal_projector.linear*": "projector"}
MLA = {
    "*.self_attn.q_a_proj.weight": "q_proj",
    "*.self_attn.q_b_proj.weight": "q_proj",
    "*.self_attn.kv_a_proj_with_mqa.weight": "kv_proj",
    "*.self_attn.kv_b_proj.weight": "kv_proj",
    "*.self_attn.o_proj.weight": "o_proj",
    "*.mlp.gate.weight": "router",
    "*.shared_experts.up_proj.weight": "up_proj",
    "*.experts.gate_up_proj": "gate_up_proj",
}
DELTA = {
    "*.linear_attn.in_proj_qkv*": "qkv_proj",
    "*.linear_attn.out_proj.*": "o_proj",
    "*.linear_attn.conv1d.*": "attention",
    "*.linear_attn.A_log": "attention",
}

TYPES: Mapping[str, Mapping[str, str]] = {
    "albert": {
        "*.attention.query.*": "q_proj",
        "*.attention.dense.*": "o_proj",
        "*.ffn.*": "up_proj",
        "*.ffn_output.*": "down_proj",
        "*embedding_hidden_mapping_in.*": "embed_proj",
        "predictions.dense.*": "head",
    },
    "bamba": {**HYBRID, "*.self_attn.q_proj.*": "q_proj", "*.feed_forward.up_proj.*": "up_proj"},
    "bart": BART,
    "bert_cls": {**BERT, "bert.pooler.dense.*": "head", "classifier.*": "head"},
    "bert_mlm": {**BERT, "cls.predictions.transform.dense.*": "head", "cls.predictions.decoder.weight": "lm_head"},
    "blip2": {
        "vision_model.*.self_attn.qkv.*": "qkv_proj",
        "vision_model.*.self_attn.projection.*": "o_proj",
        "qformer.*.attention.attention.query.*": "q_proj",
        "qformer.*.intermediate_query.*": "up_proj",
        "language_projection.*": "projector",
        "query_tokens": "embed_tokens",
    },
    "bloom": {
        "*.word_embeddings.weight": "embed_tokens",
        "*.query_key_value.*": "qkv_proj",
        "*.self_attention.dense.*": "o_proj",
        "*.dense_h_to_4h.*": "up_proj",
        "*.dense_4h_to_h.*": "down_proj",
    },
    "clip": {**SIGLIP, "text_model.*.mlp.fc2.*": "down_proj", "text_projection.*": "projector"},
    "codegen": {"*.attn.qkv_proj.*": "qkv_proj", "*.attn.out_proj.*": "o_proj", "*.mlp.fc_in.*": "up_proj"},
    "cohere2": LLAMA,
    "convnext": {
        "*.patch_embeddings.*": "embed_tokens",
        "*.dwconv.*": "conv",
        "*.pwconv1.*": "up_proj",
        "*.pwconv2.*": "down_proj",
        "*.downsampling_layer.1.*": "conv",
        "classifier.*": "head",
    },
    "deberta": {
        "*.self.in_proj.weight": "qkv_proj",
        "*.self.q_bias": "q_proj",
        "*.self.pos_q_proj.*": "attention",
        "*.attention.output.dense.*": "o_proj",
        "*.intermediate.dense.*": "up_proj",
        "pooler.dense.*": "head",
    },
    "deberta_v2": {
        "*.self.query_proj.*": "q_proj",
        "*.self.pos_key_proj.*": "attention",
        "deberta.encoder.conv.conv.*": "conv",
        "cls.predictions.transform.dense.*": "head",
    },
    "deepseek_v2": MLA,
    "deepseek_v3": {**MLA, "*.mlp.gate.e_score_correction_bias": "router"},
    "deepseek_v32": {**MLA, "*.indexer.wq_b.*": "q_proj", "*.indexer.wk.*": "k_proj", "*.weights_proj.*": "attention"},
    "detr": {
        "model.backbone.*.layer.*.convolution.*": "conv",
        "model.encoder.*.self_attn.q_proj.*": "q_proj",
        "model.decoder.*.encoder_attn.o_proj.*": "o_proj",
        "model.decoder.*.mlp.fc2.*": "down_proj",
        "class_labels_classifier.*": "head",
        "bbox_predictor.*": "head",
    },
    "dinov2": VIT,
    "dinov3_vit": {"*.attention.v_proj.*": "v_proj", "*.mlp.up_proj.*": "up_proj", "embeddings.*": "embed_tokens"},
    "distilbert": {
        "*.attention.q_lin.*": "q_proj",
        "*.attention.out_lin.*": "o_proj",
        "*.ffn.lin1.*": "up_proj",
        "*.ffn.lin2.*": "down_proj",
        "vocab_transform.*": "head",
        "vocab_projector.*": "lm_head",
    },
    "electra": {**BERT, "electra.embeddings_project.*": "embed_proj", "generator_predictions.dense.*": "head"},
    "esm": {**{name: kind for name, kind in BERT.items() if "position" not in name and "Layer" not in name}},
    "exaone4": {name: kind for name, kind in LLAMA.items() if "input_layernorm" not in name},
    "falcon": {
        "*.query_key_value.*": "qkv_proj",
        "*.self_attention.dense.*": "o_proj",
        "*.dense_4h_to_h.*": "down_proj",
    },
    "falcon_h1": {**HYBRID, "*.self_attn.k_proj.*": "k_proj", "*.feed_forward.gate_proj.*": "gate_proj"},
    "falcon_mamba": {**MAMBA, "*.mixer.x_proj.*": "mixer", "*.mixer.dt_proj.*": "mixer"},
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "gemma3_vlm": {**SIGLIP, "*.mm_input_projection_weight": "projector"},
    "gemma3n": {
        **LLAMA,
        "*.laurel.linear_left.*": "ffn",
        "*embed_tokens_per_layer.*": "embed_tokens",
        "*per_layer_model_projection.*": "embed_proj",
    },
    "gemma4_text": {**LLAMA, "*embed_tokens_per_layer.*": "embed_tokens", "*per_layer_input_gate.*": "embed_proj"},
    "glm4": {**{name: kind for name, kind in LLAMA.items() if "mlp" not in name}, "*.gate_up_proj.*": "gate_up_proj"},
    "glm4_moe": {**GATE, "*.mlp.gate.e_score_correction_bias": "router"},
    "gpt1": {"*.tokens_embed.*": "embed_tokens", "*.positions_embed.*": "embed_tokens", "*.attn.c_proj.*": "o_proj"},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": {"*.attn.attention.q_proj.*": "q_proj", "*.attn.attention.out_proj.*": "o_proj", "*.c_fc.*": "up_proj"},
    "gpt_neox": {
        "gpt_neox.embed_in.*": "embed_tokens",
        "*.attention.query_key_value.*": "qkv_proj",
        "*.attention.dense.*": "o_proj",
    },
    "gpt_oss": {**MOE, "*.mlp.router.*": "router", "*.self_attn.sinks": "attention"},
    "gptj": {"*.attn.q_proj.*": "q_proj", "*.attn.out_proj.*": "o_proj", "*.mlp.fc_out.*": "down_proj"},
    "granite": LLAMA,
    "granitemoe": {"*.self_attn.q_proj.*": "q_proj", "*.router.*": "router", "*norm.weight": "norm"},
    "granitemoehybrid": {**HYBRID, "*.router.*": "router", "*.shared_mlp.input_linear.*": "gate_up_proj"},
    "internvl": {
        "model.vision_tower.*.attention.q_proj.*": "q_proj",
        "model.vision_tower.*.attention.projection_layer.*": "o_proj",
        **PROJECTOR,
    },
    "jamba": {**HYBRID, "*.mamba.x_proj.*": "mixer", "*.feed_forward.router.*": "router"},
    "kimi_linear": {"*.self_attn.b_proj.*": "attention", "*.self_attn.o_proj.*": "o_proj", "*.mlp.gate.*": "router"},
    "lfm2": {
        "*.conv.in_proj.*": "in_proj",
        "*.conv.out_proj.*": "out_proj",
        "*.conv.conv.*": "mixer",
        "*.self_attn.out_proj.*": "o_proj",
        "*.feed_forward.w1.*": "gate_proj",
    },
    "lfm2_moe": {"*.conv.in_proj.*": "in_proj", "*.expert_bias": "router", "*.feed_forward.gate.*": "router"},
    "llama": LLAMA,
    "llama_cls": {"score.weight": "head", "*.mlp.up_proj.*": "up_proj"},
    "llama_qa": {"qa_outputs.*": "head", "*.mlp.up_proj.*": "up_proj"},
    "llama4_text": {"*.feed_forward.router.*": "router", "*.feed_forward.experts.gate_up_proj": "gate_up_proj"},
    "llava": {**SIGLIP, **PROJECTOR, "model.language_model.*.mlp.up_proj.*": "up_proj"},
    "mamba": {**MAMBA, "*.mixer.x_proj.*": "mixer"},
    "mamba2": {**MAMBA, "*.mixer.dt_bias": "mixer", "*.mixer.norm.*": "norm"},
    "minimax": {
        "*.self_attn.qkv_proj.*": "qkv_proj",
        "*.self_attn.output_gate.*": "attention",
        "*.gate.weight": "router",
    },
    "minimax_m2": {**GATE, "*.e_score_correction_bias": "router"},
    "mistral": LLAMA,
    "mistral3": {
        "model.vision_tower.patch_conv.*": "conv",
        "model.vision_tower.*.attention.o_proj.*": "o_proj",
        "*patch_merger.merging_layer.*": "projector",
        **PROJECTOR,
    },
    "mixtral": GATE,
    "modernbert": {
        "*.attn.Wqkv.*": "qkv_proj",
        "*.attn.Wo.*": "o_proj",
        "*.mlp.Wi.*": "gate_up_proj",
        "*.mlp.Wo.*": "down_proj",
        "head.dense.*": "head",
        "decoder.weight": "lm_head",
    },
    "mpnet": {"*.attention.attn.q.*": "q_proj", "*.attention.attn.o.*": "o_proj", "*.intermediate.dense.*": "up_proj"},
    "mpt": {"*.attn.Wqkv.*": "qkv_proj", "*.ffn.up_proj.*": "up_proj", "*norm_f.*": "norm"},
    "nemotron_h": {
        "*.mixer.in_proj.*": "in_proj",
        "*.mixer.out_proj.*": "out_proj",
        "*.mixer.A_log": "mixer",
        "*.mixer.q_proj.*": "q_proj",
        "*.mixer.o_proj.*": "o_proj",
        "*.mixer.gate.weight": "router",
        "*.mixer.shared_experts.up_proj.*": "up_proj",
    },
    "nllb_moe": {
        "*.cross_attention.q_proj.*": "q_proj",
        "*.router.classifier.*": "router",
        "*.expert_0.fc1.*": "up_proj",
    },
    "olmo2": {name: kind for name, kind in LLAMA.items() if "input_layernorm" not in name},
    "olmoe": GATE,
    "opt": {"*.project_in.*": "embed_proj", "*.project_out.*": "embed_proj", "*.self_attn.out_proj.*": "o_proj"},
    "paligemma": {**SIGLIP, **PROJECTOR},
    "phi": {"*.self_attn.dense.*": "o_proj", "*.mlp.fc1.*": "up_proj", "lm_head.*": "lm_head"},
    "phi3": {"*.self_attn.qkv_proj.*": "qkv_proj", "*.mlp.gate_up_proj.*": "gate_up_proj"},
    "phimoe": {**MOE, "*.mlp.router.*": "router"},
    "qwen2": LLAMA,
    "qwen2_5_vl": {**QWEN_VL, "model.visual.*.mlp.gate_proj.*": "gate_proj", "*.merger.mlp.*": "projector"},
    "qwen2_audio": {
        "model.audio_tower.conv1.*": "conv",
        "model.audio_tower.*.self_attn.q_proj.*": "q_proj",
        "model.audio_tower.*.fc1.*": "up_proj",
        **PROJECTOR,
    },
    "qwen2_moe": {**GATE, "*.shared_expert_gate.*": "router", "*.shared_expert.down_proj.*": "down_proj"},
    "qwen2_vl": {**QWEN_VL, "model.visual.*.mlp.fc1.*": "up_proj", "*.merger.mlp.*": "projector"},
    "qwen3": {**LLAMA, "*.q_norm.*": "norm"},
    "qwen3_5": {**DELTA, "*.linear_attn.in_proj_z.*": "attention"},
    "qwen3_moe": GATE,
    "qwen3_next": {**DELTA, **GATE},
    "qwen3_vl": {**QWEN_VL, "*visual.merger.linear_fc1.*": "projector", "model.visual.*.mlp.linear_fc2.*": "down_proj"},
    "qwen3_vl_moe": {**QWEN_VL, "*.deepstack_merger_list.*.linear_fc1.*": "projector", "*.mlp.gate.*": "router"},
    "resnet": {
        "*.embedder.convolution.*": "embed_tokens",
        "*.layer.*.convolution.*": "conv",
        "*normalization.*": "norm",
    },
    "roberta_cls": {**BERT, "classifier.*": "head"},
    "roberta_mlm": {**BERT, "lm_head.decoder.weight": "lm_head"},
    "rwkv": {
        "*.attention.key.*": "in_proj",
        "*.attention.receptance.*": "in_proj",
        "*.attention.output.*": "out_proj",
        "*.attention.time_decay": "mixer",
        "*.feed_forward.key.*": "up_proj",
        "*.feed_forward.value.*": "down_proj",
    },
    "segformer": {
        "*.patch_embeddings.proj.*": "embed_tokens",
        "*.attention.q_proj.*": "q_proj",
        "*.sequence_reduction.sequence_reduction.*": "attention",
        "*.mlp.fc1.*": "up_proj",
    },
    "siglip": {**SIGLIP, "text_model.head.*": "head", "vision_model.head.attention.in_proj_weight": "qkv_proj"},
    "siglip2": {**SIGLIP, "text_model.head.*": "head"},
    "smollm3": LLAMA,
    "starcoder2": {"*.self_attn.o_proj.*": "o_proj", "*.mlp.c_fc.*": "up_proj", "*.mlp.c_proj.*": "down_proj"},
    "swin": {
        **{name: kind for name, kind in VIT.items() if "cls_token" not in name},
        "*relative_position_bias_table": "attention",
        "*.downsample.reduction.*": "conv",
    },
    "switch": {
        **{name: kind for name, kind in T5.items() if "Dense" not in name},
        "encoder.block.0.layer.1.mlp.wi.*": "up_proj",
        "*.mlp.router.classifier.*": "router",
        "*.experts.expert_1.wo.*": "down_proj",
    },
    "t5": T5,
    "t5_gated": {
        **{name: T5[name] for name in T5 if ".wi." not in name},
        "*.wi_0.*": "gate_proj",
        "*.wi_1.*": "up_proj",
    },
    "vit": {**VIT, "classifier.*": "head"},
    "vit_mae": {**VIT, "decoder.decoder_layers.*.mlp.fc1.*": "up_proj", "decoder.decoder_pred.*": "head"},
    "wav2vec2": {
        "*.conv_layers.*.conv.*": "conv",
        "*.attention.q_proj.*": "q_proj",
        "*.feed_forward.intermediate_dense.*": "up_proj",
        "*.feed_forward.output_dense.*": "down_proj",
        "lm_head.*": "head",
    },
    "whisper": {
        **{name: kind for name, kind in BART.items() if name not in ("lm_head.weight", "model.shared.weight")},
        "model.encoder.conv1.*": "conv",
        "proj_out.weight": "head",
    },
    "xlnet": {"*.rel_attn.r": "attention", "*.ff.layer_1.*": "up_proj", "lm_loss.*": "lm_head"},
    "xlstm": {
        "*.mlstm_layer.q.*": "in_proj",
        "*.mlstm_layer.out_proj.*": "out_proj",
        "*.mlstm_layer.igate_preact.*": "mixer",
        "*.ffn.proj_up_gate.*": "gate_proj",
        "*.ffn.proj_down.*": "down_proj",
    },
    "zamba2": {**HYBRID, "*.mamba_decoder.mamba.in_proj.*": "in_proj"},
}
"""Patterns of names in each family, with their module types, as a person reads them."""

_STACKS: Mapping[tuple[str, ...], Mapping[str, str]] = {
    ("bart", "nllb_moe"): {"model.encoder.*": "encoder", "model.decoder.*": "decoder"},
    ("t5", "t5_gated", "switch"): {"encoder.*": "encoder", "decoder.*": "decoder"},
    ("whisper",): {"model.encoder.*": "audio", "model.decoder.*": "language"},
    ("wav2vec2",): {"*": "audio"},
    ("convnext", "detr", "dinov2", "dinov3_vit", "resnet", "segformer", "swin", "vit", "vit_mae"): {"*": "vision"},
    ("clip", "siglip", "siglip2"): {"vision_model.*": "vision", "text_model.*": "language"},
    ("blip2",): {"vision_model.*": "vision", "qformer.*": "projector", "language_model.*": "language"},
    ("gemma3_vlm", "internvl", "llava", "mistral3", "paligemma"): {
        "model.vision_tower.*": "vision",
        "*multi_modal_projector.*": "projector",
        "model.language_model.*": "language",
    },
    ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"): {
        "model.visual.blocks.*": "vision",
        "*.merger.*": "projector",
        "model.language_model.*": "language",
    },
    ("qwen2_audio",): {
        "*audio_tower.*": "audio",
        "*multi_modal_projector.*": "projector",
        "*language_model.*": "language",
    },
}
TOWERS = {family: towers for families, towers in _STACKS.items() for family in families}
"""Patterns of names with their towers; of families that are not here, all is language."""


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
