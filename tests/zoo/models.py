"""Tiny models of what transformers holds, built from their configurations: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["MODELS", "Recipe", "build", "config_of"]


@dataclass(frozen=True)
class Recipe:
    """How to build one model.

    Attributes
    ----------
    model : str
        Its class in transformers.
    config : str
        The class of its configuration.
    sizes : mapping of str to object
        What to give to that; a mapping in it is the configuration of a part.
    """

    model: str
    config: str
    sizes: Mapping[str, Any]


_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **_HEADS}
_HEAD_DIM = {**_LLAMA, "head_dim": 8}
_BERT = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "max_position_embeddings": 40},
}
_GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_VIT = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"image_size": 32, "patch_size": 8, "num_channels": 3},
}
_BART = {
    **{"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "max_position_embeddings": 32},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
}
_T5 = {
    **{"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4},
    **{"num_layers": 2, "num_decoder_layers": 3},
}
_MLA = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
_DEEPSEEK = {
    **_LLAMA,
    **_MLA,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_WAV2VEC2 = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 16},
    **{"conv_dim": [16, 16], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
}
_QWEN_VISION = {"depth": 2, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
_QWEN3_VISION = {
    **_QWEN_VISION,
    **{"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16},
    "deepstack_visual_indexes": [0, 1],
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}

MODELS: Mapping[str, Recipe] = {
    "albert": Recipe("AlbertForMaskedLM", "AlbertConfig", {**_BERT, "embedding_size": 16}),
    "bamba": Recipe(
        "BambaForCausalLM",
        "BambaConfig",
        {**_LLAMA, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1]},
    ),
    "bart": Recipe("BartForConditionalGeneration", "BartConfig", _BART),
    "bert_cls": Recipe("BertForSequenceClassification", "BertConfig", _BERT),
    "bert_mlm": Recipe("BertForMaskedLM", "BertConfig", _BERT),
    "blip2": Recipe(
        "Blip2ForConditionalGeneration",
        "Blip2Config",
        {
            "vision_config": _VIT,
            "qformer_config": {**_BERT, "encoder_hidden_size": 32},
            "text_config": {
                **{"model_type": "opt", "vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32},
                **{"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32},
            },
        },
    ),
    "bloom": Recipe(
        "BloomForCausalLM", "BloomConfig", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    ),
    "clip": Recipe("CLIPModel", "CLIPConfig", {"text_config": _BERT, "vision_config": _VIT, "projection_dim": 16}),
    "codegen": Recipe("CodeGenForCausalLM", "CodeGenConfig", {**_GPT, "rotary_dim": 4}),
    "cohere2": Recipe("Cohere2ForCausalLM", "Cohere2Config", _LLAMA),
    "convnext": Recipe(
        "ConvNextForImageClassification", "ConvNextConfig", {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]}
    ),
    "deberta": Recipe(
        "DebertaForSequenceClassification",
        "DebertaConfig",
        {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8},
    ),
    "deberta_v2": Recipe(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "conv_kernel_size": 3},
    ),
    "deepseek_v2": Recipe("DeepseekV2ForCausalLM", "DeepseekV2Config", _DEEPSEEK),
    "deepseek_v3": Recipe("DeepseekV3ForCausalLM", "DeepseekV3Config", _DEEPSEEK),
    "deepseek_v32": Recipe(
        "DeepseekV32ForCausalLM",
        "DeepseekV32Config",
        {**_DEEPSEEK, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4},
    ),
    "detr": Recipe(
        "DetrForObjectDetection",
        "DetrConfig",
        {
            **{"use_timm_backbone": False, "use_pretrained_backbone": False, "num_queries": 5, "d_model": 32},
            **{"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
            **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
            "backbone_config": {
                **{"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]},
                **{"layer_type": "basic", "out_features": ["stage2"]},
            },
        },
    ),
    "dinov2": Recipe("Dinov2Model", "Dinov2Config", _VIT),
    "dinov3_vit": Recipe("DINOv3ViTModel", "DINOv3ViTConfig", _VIT),
    "distilbert": Recipe(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40},
    ),
    "electra": Recipe("ElectraForMaskedLM", "ElectraConfig", {**_BERT, "embedding_size": 16}),
    "esm": Recipe("EsmForMaskedLM", "EsmConfig", {**_BERT, "pad_token_id": 1, "position_embedding_type": "rotary"}),
    "exaone4": Recipe("Exaone4ForCausalLM", "Exaone4Config", _LLAMA),
    "falcon": Recipe("FalconForCausalLM", "FalconConfig", {**_LLAMA, "num_kv_heads": 2}),
    "falcon_h1": Recipe(
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {**_LLAMA, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    ),
    "falcon_mamba": Recipe("FalconMambaForCausalLM", "FalconMambaConfig", {**_LLAMA, "state_size": 8}),
    "gemma2": Recipe("Gemma2ForCausalLM", "Gemma2Config", _HEAD_DIM),
    "gemma3_text": Recipe("Gemma3ForCausalLM", "Gemma3TextConfig", _HEAD_DIM),
    "gemma3_vlm": Recipe(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": _HEAD_DIM, "vision_config": {"model_type": "siglip_vision_model", **_VIT}},
    ),
    "gemma3n": Recipe(
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            **_HEAD_DIM,
            **{"intermediate_size": [48, 48], "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8},
            **{"laurel_rank": 8, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]},
        },
    ),
    "gemma4_text": Recipe(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            **_HEAD_DIM,
            **{"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0},
        },
    ),
    "glm4": Recipe("Glm4ForCausalLM", "Glm4Config", {**_HEAD_DIM, "pad_token_id": 0}),
    "glm4_moe": Recipe(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {**_HEAD_DIM, "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt1": Recipe("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", _GPT),
    "gpt2": Recipe("GPT2LMHeadModel", "GPT2Config", _GPT),
    "gpt_bigcode": Recipe("GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT),
    "gpt_neo": Recipe(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            **{"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 32},
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "gpt_neox": Recipe("GPTNeoXForCausalLM", "GPTNeoXConfig", _BERT),
    "gpt_oss": Recipe(
        "GptOssForCausalLM", "GptOssConfig", {**_HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "gptj": Recipe("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "granite": Recipe("GraniteForCausalLM", "GraniteConfig", _LLAMA),
    "granitemoe": Recipe("GraniteMoeForCausalLM", "GraniteMoeConfig", {**_LLAMA, "num_local_experts": 4}),
    "granitemoehybrid": Recipe(
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {
            **_LLAMA,
            **{"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
            **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "layer_types": ["mamba", "attention"]},
        },
    ),
    "internvl": Recipe(
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        {
            "text_config": {"model_type": "qwen2", **_LLAMA},
            "vision_config": {**_VIT, "image_size": [32, 32], "patch_size": [8, 8]},
        },
    ),
    "jamba": Recipe(
        "JambaForCausalLM",
        "JambaConfig",
        {
            **_LLAMA,
            **{"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
            **{"expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
        },
    ),
    "kimi_linear": Recipe(
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        {
            **_LLAMA,
            **_MLA,
            **{
                "pad_token_id": 0,
                "q_lora_rank": None,
                "num_key_value_heads": 4,
                "num_experts": 4,
                "moe_intermediate_size": 24,
            },
            **{"linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 8},
            "linear_value_head_dim": 8,
        },
    ),
    "lfm2": Recipe("Lfm2ForCausalLM", "Lfm2Config", {**_LLAMA, "layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": Recipe(
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        {**_LLAMA, **_EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    ),
    "llama": Recipe("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "llama_cls": Recipe("LlamaForSequenceClassification", "LlamaConfig", {**_LLAMA, "pad_token_id": 0}),
    "llama_qa": Recipe("LlamaForQuestionAnswering", "LlamaConfig", _LLAMA),
    "llama4_text": Recipe(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**_HEAD_DIM, "intermediate_size_mlp": 48, "num_local_experts": 4, "interleave_moe_layer_step": 2},
    ),
    "llava": Recipe(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **_LLAMA},
            "vision_config": {"model_type": "clip_vision_model", **_VIT},
        },
    ),
    "mamba": Recipe("MambaForCausalLM", "MambaConfig", {**_LLAMA, "state_size": 8}),
    "mamba2": Recipe(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {**_LLAMA, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    ),
    "minimax": Recipe(
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        {**_HEAD_DIM, "num_local_experts": 4, "layer_types": ["full_attention", "linear_attention"], "block_size": 4},
    ),
    "minimax_m2": Recipe("MiniMaxM2ForCausalLM", "MiniMaxM2Config", {**_HEAD_DIM, "num_local_experts": 4}),
    "mistral": Recipe("MistralForCausalLM", "MistralConfig", _LLAMA),
    "mistral3": Recipe(
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {"text_config": {"model_type": "mistral", **_LLAMA}, "vision_config": {"model_type": "pixtral", **_VIT}},
    ),
    "mixtral": Recipe("MixtralForCausalLM", "MixtralConfig", {**_LLAMA, "num_local_experts": 4}),
    "modernbert": Recipe("ModernBertForMaskedLM", "ModernBertConfig", {**_BERT, "pad_token_id": 0}),
    "mpnet": Recipe("MPNetForMaskedLM", "MPNetConfig", _BERT),
    "mpt": Recipe("MptForCausalLM", "MptConfig", {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4}),
    "nemotron_h": Recipe(
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            **_HEAD_DIM,
            **{"layers_block_type": ["mamba", "attention", "moe"], "num_hidden_layers": 3, "n_groups": 1},
            **{"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_routed_experts": 4},
            **{"moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24, "num_experts_per_tok": 2},
        },
    ),
    "nllb_moe": Recipe(
        "NllbMoeForConditionalGeneration",
        "NllbMoeConfig",
        {**_BART, "num_experts": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
    ),
    "olmo2": Recipe("Olmo2ForCausalLM", "Olmo2Config", _LLAMA),
    "olmoe": Recipe("OlmoeForCausalLM", "OlmoeConfig", {**_LLAMA, "num_experts": 4}),
    "opt": Recipe(
        "OPTForCausalLM",
        "OPTConfig",
        {
            **{"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"max_position_embeddings": 32, "word_embed_proj_dim": 16},
        },
    ),
    "paligemma": Recipe(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {
            "text_config": {"model_type": "gemma", **_HEAD_DIM},
            "vision_config": {"model_type": "siglip_vision_model", **_VIT},
        },
    ),
    "phi": Recipe("PhiForCausalLM", "PhiConfig", _LLAMA),
    "phi3": Recipe("Phi3ForCausalLM", "Phi3Config", {**_LLAMA, "pad_token_id": 0}),
    "phimoe": Recipe("PhimoeForCausalLM", "PhimoeConfig", {**_LLAMA, "num_local_experts": 4}),
    "qwen2": Recipe("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "qwen2_5_vl": Recipe(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": {**_LLAMA, **_MROPE},
            "vision_config": {**_QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32},
        },
    ),
    "qwen2_audio": Recipe(
        "Qwen2AudioForConditionalGeneration",
        "Qwen2AudioConfig",
        {
            "text_config": {"model_type": "qwen2", **_LLAMA},
            "audio_config": {
                **{"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48},
                **{"num_mel_bins": 8, "max_source_positions": 16},
            },
        },
    ),
    "qwen2_moe": Recipe(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**_LLAMA, **_EXPERTS, "shared_expert_intermediate_size": 24}
    ),
    "qwen2_vl": Recipe(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {"text_config": {**_LLAMA, **_MROPE}, "vision_config": {**_QWEN_VISION, "embed_dim": 32, "hidden_size": 32}},
    ),
    "qwen3": Recipe("Qwen3ForCausalLM", "Qwen3Config", _HEAD_DIM),
    "qwen3_5": Recipe(
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        {
            **_HEAD_DIM,
            **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8},
            **{"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
        },
    ),
    "qwen3_moe": Recipe("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_HEAD_DIM, **_EXPERTS}),
    "qwen3_next": Recipe(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            **_HEAD_DIM,
            **_EXPERTS,
            **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8},
            **{"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
            "shared_expert_intermediate_size": 24,
        },
    ),
    "qwen3_vl": Recipe(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {"text_config": {**_HEAD_DIM, **_MROPE}, "vision_config": _QWEN3_VISION},
    ),
    "qwen3_vl_moe": Recipe(
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {"text_config": {**_HEAD_DIM, **_EXPERTS, **_MROPE}, "vision_config": _QWEN3_VISION},
    ),
    "resnet": Recipe(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1], "layer_type": "basic"},
    ),
    "roberta_cls": Recipe("RobertaForSequenceClassification", "RobertaConfig", _BERT),
    "roberta_mlm": Recipe("RobertaForMaskedLM", "RobertaConfig", _BERT),
    "rwkv": Recipe("RwkvForCausalLM", "RwkvConfig", {**_LLAMA, "attention_hidden_size": 32}),
    "segformer": Recipe(
        "SegformerForImageClassification",
        "SegformerConfig",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1], "num_attention_heads": [1, 2, 2, 4]},
    ),
    "siglip": Recipe("SiglipModel", "SiglipConfig", {"text_config": _BERT, "vision_config": _VIT}),
    "siglip2": Recipe(
        "Siglip2Model", "Siglip2Config", {"text_config": _BERT, "vision_config": {**_VIT, "num_patches": 16}}
    ),
    "smollm3": Recipe("SmolLM3ForCausalLM", "SmolLM3Config", {**_LLAMA, "pad_token_id": 0}),
    "starcoder2": Recipe("Starcoder2ForCausalLM", "Starcoder2Config", _LLAMA),
    "swin": Recipe(
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 32, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "switch": Recipe(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {**_T5, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    ),
    "t5": Recipe("T5ForConditionalGeneration", "T5Config", _T5),
    "t5_gated": Recipe("T5ForConditionalGeneration", "T5Config", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "vit": Recipe("ViTForImageClassification", "ViTConfig", _VIT),
    "vit_mae": Recipe(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        {
            **_VIT,
            **{"decoder_hidden_size": 32, "decoder_intermediate_size": 48, "decoder_num_attention_heads": 4},
            "decoder_num_hidden_layers": 2,
        },
    ),
    "wav2vec2": Recipe("Wav2Vec2ForCTC", "Wav2Vec2Config", _WAV2VEC2),
    "whisper": Recipe(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_BART, "pad_token_id": 0, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
    ),
    "xlnet": Recipe(
        "XLNetLMHeadModel", "XLNetConfig", {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    ),
    "xlstm": Recipe(
        "xLSTMForCausalLM", "xLSTMConfig", {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4}
    ),
    "zamba2": Recipe(
        "Zamba2ForCausalLM",
        "Zamba2Config",
        {
            **_LLAMA,
            **{"num_hidden_layers": 3, "num_key_value_heads": 4, "layers_block_type": ["mamba", "mamba", "hybrid"]},
            **{"mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "num_mem_blocks": 1},
            **{"attention_head_dim": 16, "adapter_rank": 4},
        },
    ),
}
"""By the family, as its documentation calls it; a few with two heads."""


def config_of(name: str) -> Any:
    """The configuration of one of `MODELS`; a class that this version of transformers lacks raises AttributeError."""
    import transformers

    return getattr(transformers, MODELS[name].config)(**MODELS[name].sizes)


def build(name: str, *, seed: int = 0, device: str = "cpu") -> Any:
    """Build one of `MODELS` with the random values of `seed`; on the device "meta" with none."""
    import torch
    import transformers

    torch.manual_seed(seed)
    with torch.device(device):
        return getattr(transformers, MODELS[name].model)(config_of(name)).eval()
