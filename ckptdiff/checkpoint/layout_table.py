"""List how model families store the same weights under other names, in other pieces, or with axes swapped.

Facts about formats, most of them those of transformers 5, one row a rule. ``layouts.py`` applies them, and
``tests/checkpoint/test_conversion_facts.py`` holds them against the rules of the transformers that is installed.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LAYOUTS", "RENAMES", "Layout"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Which parts a stored tensor holds.

    A part is the weight of a linear layer, of shape [out, in], or its bias. Parts follow each other along ``out``. One
    more axis in front runs over experts.

    Attributes
    ----------
    names : str
        How the tensor's name ends, without ``.weight`` or ``.bias``; several in a row, between spaces. ``_`` at the end
        stands before ``weight`` in place of the dot.
    parts : str
        In their order, between spaces. Layouts of the same parts stand for each other.
    equal : bool
        All parts have equal shapes. Otherwise their rows follow from the side that stores them one by one.
    transposed : bool or None
        Stored as [in, out]. None: shapes tell. They also do wherever an axis runs over experts.
    interleaved : bool or None
        Rows of the parts take turns. None: where experts have biases, as in GPT-OSS.
    permuted : bool or None
        Rows of q and k may be permuted for rotary embeddings, so that no piece holds them. None: in one family, and not
        in most others.
    ndim : int
        Axes of a part that is no bias.
    """

    names: str
    parts: str
    equal: bool = False
    transposed: bool | None = False
    interleaved: bool | None = False
    permuted: bool | None = False
    ndim: int = 2


LAYOUTS: tuple[Layout, ...] = (
    # Feed-forward parts, of a layer or of its experts. Qwen, DeepSeek, GLM, OLMoE, Jamba; Mixtral, MiniMax, LFM2 (w).
    Layout("gate_proj w1 experts.*.fc1", "gate"),
    Layout("up_proj w3 experts.*.fc3", "up"),
    Layout("down_proj w2 experts.*.fc2 w2_ w2_md weights_out", "down"),
    # Phi-3, GLM, and all experts of transformers 5; in GPT-OSS rows take turns. DINOv2 and Sapiens have other names.
    Layout("gate_up_proj", "gate up", equal=True, interleaved=None),
    Layout("weights_in w12", "gate up", equal=True),
    # GTE, Molmo 2.
    Layout("up_gate_proj ff_proj", "up gate", equal=True),
    # Inkling.
    Layout("w13_ w13_dn shared_w13_", "gate up", equal=True, interleaved=True),
    Layout("shared_w2_", "down"),
    # NeMo's Nemotron-H, which has no gate in spite of the name.
    Layout("gate_and_up_projs", "up", transposed=True),
    Layout("down_projs", "down", transposed=True),
    # Without a gate.
    Layout("mlp.fc1", "fc1"),
    Layout("mlp.fc2", "fc2"),
    # Attention.
    Layout("attn.q_proj attn.query attn.to_q attn.q_lin", "q"),
    Layout("attn.k_proj attn.key attn.to_k attn.k_lin", "k"),
    Layout("attn.v_proj attn.value attn.to_v attn.v_lin attn.wv", "v"),
    Layout("attn.qkv attn.qkv_proj attn.Wqkv attn.w_qkv attn.att_proj", "q k v"),
    # torch.nn.MultiheadAttention. Step-3.5's vision tower has the same names.
    Layout("attn.in_proj_", "q k v", permuted=None),
    # Meta's Llama and Mistral's own files, Kimi's vision tower.
    Layout("attn.wq", "q", permuted=True),
    Layout("attn.wk", "k", permuted=True),
    Layout("attn.wqkv", "q k v", permuted=True),
    # HRM: attention with a gate of its own.
    Layout("attn.gate_proj", "attention_gate"),
    Layout("attn.gqkv_proj", "attention_gate q k v"),
    # GPT-2's Conv1D is a linear layer stored the other way round.
    Layout("attn.c_attn", "q k v", transposed=None),
    Layout("attn.c_proj", "attention_out", transposed=None),
    Layout("mlp.c_fc", "fc1", transposed=None),
    Layout("mlp.c_proj", "fc2", transposed=None),
    # Short convolutions of linear attention: Kimi Linear, GLM, OLMo hybrid.
    Layout("q_conv1d", "q_conv", ndim=3),
    Layout("k_conv1d", "k_conv", ndim=3),
    Layout("v_conv1d", "v_conv", ndim=3),
    Layout("conv1d", "q_conv k_conv v_conv", ndim=3),
    # Molmo 2: tokens that were added later.
    Layout("wte_embedding", "tokens"),
    Layout("wte_new_embedding", "new_tokens"),
    Layout("embed_tokens", "tokens new_tokens"),
)
"""Stored forms of weights."""

RENAMES: tuple[tuple[str, str], ...] = (
    # Where the language model lies; matching.py knows more.
    (r"^(?:backbone|llm\.model)\.", ""),  # Nemotron-H
    (r"^(?:embed_out|llm\.lm_head|head|output)\.(?=weight|bias)", "lm_head."),  # GPT-NeoX, DeepSeek, Mistral
    (r"^(?:embed|tok_embeddings|word_embeddings)\.(?=weight)", "embed_tokens."),
    (r"(?:^|(?<=\.))wte\.((?:new_)?embedding)$", r"wte_\1"),  # Molmo 2
    # Stacks of layers.
    (r"(?:^|(?<=\.))encoder\.block\.\*\.\*\.", "stages.*.blocks.*."),  # SegFormer
    (r"(?:^|(?<=\.))encoder\.(patch_embeddings|layer_norm)\.\*\.", r"stages.*.\1."),
    (r"(?:^|(?<=\.))decoder_(?:encoder\.layer|layers)\.(?=\*\.)", "layers."),  # ViT-MAE
    (r"(?:^|(?<=\.))(?:(?:encoder|transformer|model)\.)?(?:layers?|blocks|resblocks)\.(?=\*\.)", "layers."),
    # Mixtures of experts.
    (r"(?:^|(?<=\.))(?:block_sparse_moe|moe)\.input_linear(?=\.)", "mlp.experts.gate_up_proj"),  # Granite
    (r"(?:^|(?<=\.))(?:block_sparse_moe|moe)\.output_linear(?=\.)", "mlp.experts.down_proj"),
    (r"(?:^|(?<=\.))moe\.(?=(?:gate|up|down)_proj\.)", "mlp.experts."),  # Step-3.5
    (r"(?<=\.experts\.)fc1(?=\.)", "gate_up_proj"),  # Aria
    (r"(?<=\.experts\.)fc2(?=\.)", "down_proj"),
    (r"(?:^|(?<=\.))(?:block_sparse_moe|feed_forward|ffn|moe|mixer(?=\.experts\.))\.", "mlp."),
    (r"(?<=\.mlp\.)(?:gate|router\.gate|router\.layer|router)\.(?=weight|bias|e_score)", "router."),
    (r"(?<=\.mlp\.)(?:router\.bias|router_bias|expert_bias|e_score_correction_bias|experts\.e_score_correction_bias)$",
     "router.e_score_correction_bias"),
    (r"(?<=\.mlp\.)(?:shared_mlp|shared_experts?|share_expert)\.", "shared_experts."),
    (r"(?<=\.)share_expert\.", "mlp.shared_experts."),
    # Attention.
    (r"(?<=layers\.\*\.)wqkv\.", "attn.wqkv."),  # Kimi
    (r"(?:^|(?<=\.))mixer\.(?=Wqkv\.)", "attn."),  # Jina
    (r"(?:^|(?<=\.))attention\.(?:self|attention)\.", "attn."),  # BERT, ViT
    (r"(?:^|(?<=\.))(?:self_attn|self_attention|attention)\.", "attn."),
    (r"(?<=attn\.)(?:output\.dense|to_out\.\*|to_out|out_proj|out_lin|attn_out|projection_layer|output|proj|wo)"
     r"\.(?=weight|bias)", "o_proj."),
    (r"(?<=attn\.)relative_position_bias_table$", "relative_position_bias.relative_position_bias_table"),  # Swin
    (r"(?<=attn\.)sr\.", "sequence_reduction.sequence_reduction."),  # SegFormer
    (r"(?<=attn\.)layer_norm\.", "sequence_reduction.layer_norm."),
    (r"(?<=attn\.)(?:softmax_offset|attention_sink_bias|learnable_sink_param)$", "sinks"),
    (r"(?<=attn\.)norm_([qk])\.", r"\1_norm."),
    # Feed-forward parts without a gate.
    (r"(?:^|(?<=\.))(?:intermediate\.dense|(?:mlp\.)?(?:dense1|dense_h_to_4h|linear1))\.", "mlp.fc1."),
    (r"(?:^|(?<=\.))(?:(?<!attn\.)output\.dense|(?:mlp\.)?(?:dense2|dense_4h_to_h|linear2))\.", "mlp.fc2."),
    (r"(?<=layers\.\*\.)fc([12])\.", r"mlp.fc\1."),  # DETR
    # Norms before attention and before the feed-forward part.
    (r"(?<=\*\.)(?:layernorm_before|norm_?1|ln_?1|layer_norm_?1|attn_norm|attention_norm)\.", "input_layernorm."),
    (r"(?<=\*\.)(?:layernorm_after|norm_?2|ln_?2|layer_norm_?2|mlp_norm|ffn_norm|ff_norm)\.",
     "post_attention_layernorm."),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
)  # fmt: skip
"""Regular expressions and what they become, in order, on names whose numbers are ``*``.

Two names that become the same are those of one tensor, if each side has one and their shapes agree."""
