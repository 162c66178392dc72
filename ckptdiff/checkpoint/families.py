r"""What the parts of a tensor's name mean, family by family: data alone, read by ``names.py``.

A name is looked at without numbers, adapters and the parameter's own name: ``model.layers.3.mlp.fc1.weight`` is
``model.layers.mlp.fc1``. Patterns are regular expressions of its last parts, in any case, and ``\w*`` never
goes beyond a part.
"""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = [
    "BLOCK_OF_MODULE",
    "FAMILIES",
    "IMAGES",
    "PLACES",
    "SOUND",
    "STACK",
    "TOWERS",
    "VOCABULARY",
    "WORDS",
    "Family",
]

BLOCK_OF_MODULE: Final = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "kv_proj": "attention",
    "qkv_proj": "attention",
    "o_proj": "attention",
    "attention": "attention",
    "gate_proj": "ffn",
    "up_proj": "ffn",
    "gate_up_proj": "ffn",
    "down_proj": "ffn",
    "ffn": "ffn",
    "in_proj": "mixer",
    "out_proj": "mixer",
    "mixer": "mixer",
    "router": "router",
    "conv": "conv",
    "modulation": "modulation",
    "projector": "projector",
    "embed_tokens": "embedding",
    "embed_proj": "embedding",
    "lm_head": "head",
    "head": "head",
    "norm": "norm",
    "other": "other",
}
"""Every module type, with the block it belongs to; a type named as its block is the rest of that block."""


class Family(NamedTuple):
    """One row of `FAMILIES`.

    Attributes
    ----------
    known_from : str
        Models that use these names.
    inside : str
        The innermost place around the module: a key of `PLACES`, "nowhere", or empty for any of these.
    types : dict of str to str
        Module type to a pattern of the last parts.
    """

    known_from: str
    inside: str
    types: dict[str, str]


PLACES: Final = {
    "attention": r"\w*(attn|attention)\w*|(\w+_)?att|self_attends|cross_attends|(first|second)_sub_layer",
    "mixer": r"(\w+_)?(mixer|mamba2?|ssm|lstm|rnn|gru|[sm]lstm|short_?conv)(_layer|_cell|_block)?|temporal_block"
    r"|rg_lru",
    "ffn": r"\w*(mlp|ffn|feed_?forward|densereludense)\w*|(\w+_)?(ff|ffw|moe)(_?layer\w*|_?[0-9]\w*|_\w+)?|laurel"
    r"|altup|third_sub_layer",
    "modulation": r"\w*(adaln|ada_ln|ada_norm|modulation)\w*|norm[0-9]?(_context|_out)?",
    "embedding": r"\w*embeddings?(_\w+)?|\w*embedder|embed_(?!tokens_extend)\w+|\w*(patch|pos)_embed(s|_\w+)?"
    r"|\w*quantizers?|codebooks?|subsampl\w*|time_(text_)?embed|patchifier|feature_projection",
    "head": r"\w*(head|heads|predictions?|predictors?|pooler|classifiers?)([_0-9]\w*)?|cls|\w*(bbox|class"
    r"|mask)_embed|\w*_qass|qa_outputs|joint|enc_out\w*",
    "conv": r"\w*(conv|convs|convolutions?|downsampl\w*|upsampl\w*|resnets?|resblocks?|shortcut)([_0-9]\w*)?|fpn"
    r"|(conv(?!_encoder)|fpn|lateral|squeeze|psp|res)_\w+|lconv1d|neck|stem[0-9]*|decoder_seanet",
}
"""Parts of a name that say what is inside them. The innermost holds, and of several that fit it the first."""

_GATED = r"\w*(mlp|ffn|feed_?forward|moe|densereludense|expert|mixer)\w*|(\w+_)?ff([_0-9]\w*)?"
_NOT_ATTENTION = r"(?!\w*att)\w+"

FAMILIES: Final = (
    Family(
        "DiT, SD3, Flux",
        "",
        {
            "modulation": r"\w*norm\w*\.(linear(_?[0-9])?|emb\.\w+)|\w*(adaln|modulation)\w*(\.\w+)?",
        },
    ),
    Family(
        "all: norms",
        "",
        {
            "norm": r"\w*norm\w*|(\w+_)?ln([_0-9]\w*)?|(\w+_)?bn[0-9]*|\w*layrnorm|\w*normalization\w*",
        },
    ),
    Family(
        "mixtures of experts",
        "",
        {
            "router": r"router(\.\w+)*|layers\.gate|shared_expert_gate|expert_bias|\w*score_correction_bias"
            rf"|({_GATED})\.({_NOT_ATTENTION}\.)*gate(\.({_NOT_ATTENTION}))*",
        },
    ),
    Family(
        "language models: heads",
        "",
        {
            "lm_head": r"\w*lm_heads?(\.\w+)*|predictions\.decoder|embed_out|vocab_projector|lm_loss"
            r"|pred_layer(\.proj)?|^(model\.)?output|^(head|decoder)$|codebooks_head|unembed",
        },
    ),
    Family(
        "RWKV",
        "",
        {
            "in_proj": r"(^|rwkv\.)blocks\.attention\.(key|value|receptance)",
            "out_proj": r"(^|rwkv\.)blocks\.attention\.output",
            "mixer": r"blocks\.attention\.time_\w+",
            "up_proj": r"blocks\.feed_forward\.key",
            "down_proj": r"blocks\.feed_forward\.value",
        },
    ),
    Family(
        "Qwen's first generation",
        "",
        {
            "up_proj": r"h\.mlp\.w1",
            "gate_proj": r"h\.mlp\.w2",
        },
    ),
    Family(
        "ModernBERT, which fuses under T5's name but for the capital",
        "",
        {
            "gate_up_proj": r"mlp\.(?-i:Wi)",
        },
    ),
    Family(
        "UNets of diffusers, whose feed-forward parts are gated",
        "",
        {
            "gate_up_proj": r"(\w*attentions|motion_modules|(down|mid|up|input|middle"
            r"|output)_blocks?)\.(\w+\.)*ff\.net\.proj",
        },
    ),
    Family(
        "LFM2",
        "",
        {
            "in_proj": r"layers\.conv\.in_proj",
            "out_proj": r"layers\.conv\.out_proj",
            "mixer": r"layers\.conv\.conv",
        },
    ),
    Family(
        "Mamba, Jamba, Nemotron-H, xLSTM, RecurrentGemma",
        "mixer",
        {
            "in_proj": r"in_proj|[qkv]|linear_[xy]|input_to_hidden|weight_ih",
            "out_proj": r"out_proj|linear_out|hidden_to_hidden",
        },
    ),
    Family(
        "EfficientNet",
        "",
        {
            "conv": r"conv_(head|stem)",
        },
    ),
    Family(
        "all: convolutional parts",
        "conv",
        {
            "embed_proj": r"time_emb_proj",
            "conv": r"\w+",
        },
    ),
    Family(
        "MobileBERT",
        "",
        {
            "ffn": r"bottleneck\.\w+(\.dense)?|output\.bottleneck(\.dense)?",
        },
    ),
    Family(
        "BERT, T5, ViT, GPT-2, Swin, wav2vec 2.0, JetMoE, timm",
        "attention",
        {
            "attention": r"gate_proj|\w*rel\w*proj\.proj",
            "q_proj": r"q|query(_global|_proj|_net)?|input_linear|projection_query|[ew]2[ew]_query|layout_query|q_bias",
            "k_proj": r"k|key(_global|_proj|_net)?|projection_key|layout_key",
            "v_proj": r"v|value(_global|_proj|_net)?|projection_value|layout_value|v_bias|values?_\w*proj",
            "kv_proj": r"kv",
            "qkv_proj": r"in_proj|(self|attention)\.qkv",
            "o_proj": r"o|wo|out_proj|to_out|out|c_proj|proj|dense|output|output_linear|output_proj|out_\w*proj"
            r"|projection(_layer|_out)?|post|post_proj|final",
        },
    ),
    Family(
        "Llama, Qwen, Mistral, Gemma, DeepSeek, OPT, GPT-J, DistilBERT, T5, diffusers",
        "",
        {
            "q_proj": r"q(_[ab])?_proj|q_attn|q_lin|wq(_\w+)?|to_q(uery)?|add_q_proj|q_head|linear_q|project_q"
            r"|queries",
            "k_proj": r"k_proj|k_lin|wk(_\w+)?|to_k(ey)?|add_k_proj|k_head|linear_k|project_k",
            "v_proj": r"v_proj|v_lin|wv(_\w+)?|to_v|add_v_proj|v_head|linear_v|project_v",
            "kv_proj": r"kv(_[ab])?_proj|kv_a_proj_with_mqa|wkv(_\w+)?|to_kv|keys_values",
            "qkv_proj": r"qkv_proj|query_key_value|qkv|w_?qkv|w_pack|c_attn|in_proj_qkvz?|queries_keys_values"
            r"|att_proj|to_(added_)?qkv",
            "o_proj": r"o(_[ab])?_proj|wo_\w+|out_lin|to_out|to_add_out|attention_out|linear_out|post_attention"
            r"|temporal_dense|single_transformer_blocks\.proj_out|stages\.layers(\.module)?\.projection",
            "gate_proj": r"gate_proj|wi_0|proj_up_gate",
            "up_proj": r"up_proj|wi_1|c_fc|fc1|fc_in|lin1|linear_fc1|dense_h_to_4h|proj_up|linear_up|ffn|pwconv1"
            r"|\w*point_?wise_conv1|proj_mlp|intermediate(_dense|_query)?|\w*_(intermediate|inter)"
            r"|layers?\.linear1",
            "gate_up_proj": r"gate_up_proj",
            "down_proj": r"down_proj|fc2|fc_out|lin2|linear_fc2|dense_4h_to_h|proj_down|linear_down|ffn_output"
            r"|pwconv2|\w*point_?wise_conv2|output_dense|\w*output\.dense|output_query|layers?\.linear2",
            "embed_tokens": r"\w*embed_tokens(_per_layer)?|embed_positions|embed_in|wte|wpe|tok_embeddings"
            r"|^(transformer\.)?w|word_embeddings|shared|\w*(cls|mask|class|register|distillation)_tokens?|\w*pos_embed|tokens_embed"
            r"|positions_embed|\w*_embeds_layers?|\w*query_feat|\w*_embeddings_table|mask_token|latents",
            "embed_proj": r"project_(in|out|hid)|embeddings_project|embedding_hidden_mapping_in|per_layer_\w+"
            r"|feature_projection(\.projection)?|embed_proj\w*|inputs_embeds_projector|word_embed_proj",
        },
    ),
    Family(
        "Mixtral, Llama's authors, T5, ModernBERT, DBRX",
        "ffn",
        {
            "gate_proj": r"w1|w_0|fc1_g",
            "up_proj": r"w3|v1|wi|fc1_x|dense1|linear1|linear_1|layer_1|ffw_layer_1|conv1|conv_1|w_in|proj_in"
            r"|ff_1|layer1|in_proj|dense_in|w_1|net\.proj",
            "down_proj": r"w2|wo|c_proj|dense2|linear2|linear_2|layer_2|ffw_layer_2|conv2|conv_2|w_out|proj_out"
            r"|layer2|out_proj|dense_out|output_linear|net|output",
            "gate_up_proj": r"input_linear",
        },
    ),
    Family(
        "Llama's authors, DBRX, Switch",
        "",
        {
            "gate_proj": r"w1",
            "up_proj": r"w3|v1|wi",
            "down_proj": r"w2|wo|c_proj",
        },
    ),
    Family(
        "all: embeddings",
        "embedding",
        {
            "embed_tokens": r"\w+",
        },
    ),
    Family(
        "all: what stands alone",
        "nowhere",
        {
            "attention": r"gateway\.gate|message_fc|(blocks|layers)\.proj|rel_pos\w*_bias",
            "q_proj": r"adapter\.query",
            "k_proj": r"adapter\.key_\w+",
            "v_proj": r"adapter\.value_\w+",
            "o_proj": r"adapter\.out_proj",
            "ffn": r"adapter\w*\.\w+\.dense[12]|(input|output|residual)_layer",
            "mixer": r"layers\.linear",
            "conv": r"\w*proj(ection|ect)?_conv|conv_proj\w*",
            "embed_tokens": r"embed|(?!\w*(class|bbox|mask)_embed)\w+_emb(ed)?|\w*tokens?|query|reference_points"
            r"|queries_features|position_enc",
            "embed_proj": r"keypoint_encoder\.encoder|altup_\w+|visn_fc|box_fc|decoder_embed|patcher|input_linear"
            r"|\w*embed_proj\w*",
            "head": r"(encoder\.)?out(_mid)?|vocab_transform|decoder_pred|(\w+_)?(head|score|classifier|pooler"
            r"|logits?\w*|output_projection\w*|decoder)|^fc|proj_out\w*",
            "modulation": r"inject_scale\.\w+",
            "projector": r"\w+\.output|(up|down)_proj_for_\w+|\w*proj(ection|ector)?s?[0-9]?(\.\w+)?"
            r"|\w*query_updater|fc\w*|\w*transform(ation)?|proj_\w+",
        },
    ),
)
"""Who names what how. The first row that fits holds; what fits none is the rest of its place."""

TOWERS: Final = {
    "projector": r"multi_modal_projector|mm_projector|projector|merger|patch_merger|(deepstack_)?mergers?_list"
    r"|deepstack_mergers|vit_merger|connector|\w+_connector|modality_projection|\w*(visual|vision|image|text"
    r"|audio|language|speech)_projection|\w*(vision|image|audio|text|visual)_proj|vision_language_adapter"
    r"|embed_vision|embed_audio|resampler|resampler_model|mlp1|aligner|generation_aligner|qformer"
    r"|perceiver_resampler|img_projection\w*|\w*projection_head|image_to_text_projection|vision_adapter"
    r"|audio_projector|image_newline",
    "vision": r"visual|vision|vision_\w+|\w+_vision|image_(encoder|tower|model|embed\w*)|img_processor"
    r"|video_(model|tower)|vit|vit_\w+|dinov[0-9]\w*|swin(v2)?|beit|deit|siglip|sam_encoder|high_res_vision_model"
    r"|vqmodel",
    "audio": r"audio|audio_(?!token)\w+|speech_(encoder|tower|model)|\w*asr_encoder|sound_\w+|acoustic_\w+"
    r"|semantic_(model|encoder|tokenizer_encoder)|wav2vec2\w*|hubert|whisper_encoder|code2wav\w*|vocoder"
    r"|token2wav|conformer",
}
"""Parts of a name that say which tower they are in; the first that fits holds, and language is the rest."""

STACK: Final = (
    r"(?!conv_|fpn_|bbox_|pan_|downsampl|upsampl|scale_)(\w+_)?(layers?|blocks?|stages?|groups?)|h|resblocks|layer[1-9]|encoders|conformer|network"
    r"|resnets|\w*attentions|motion_modules|\w*_levels"
)
"""Parts of a name after which the number of a layer, or of a stage of layers, comes."""

VOCABULARY: Final = (
    r"(^|\.)((lm_)?embed_tokens|wte|word_embeddings?|tok_embeddings|shared|embed_in|tokens_embed|(backbone\.|^)embeddings"
    r"|token_embeddings?|char_embeddings\.\w+)\.weight$"
)
"""Names of the embeddings of a vocabulary."""

WORDS: Final = r"(^|\.)(language_model|text_model|text_encoder|llm)\."
"""Names of a part that is a model of text."""

IMAGES: Final = r"(^|\.)(patch_(embed|projection)|x_embedder|keypoint_)"
"""Names that a model of images has, where no convolution over three channels tells it."""

SOUND: Final = r"(^|\.)conv2d[0-9]\."
"""Names that a model of sound has, where no convolution over one dimension tells it."""
