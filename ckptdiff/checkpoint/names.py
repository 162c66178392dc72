"""Place a tensor in its model by its name: layer, tower, module type and block.

Names of Llama, Qwen, Mistral, Gemma, Phi, GPT-2, GPT-J, GPT-NeoX, Falcon, BLOOM, OPT, BERT, T5, ViT, CLIP, SigLIP,
Mamba, of mixtures of experts and vision-language models built from them, and of the blocks of diffusers. A name of no
known form is ``other``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["BLOCK_OF_MODULE", "Place", "locate"]

BLOCK_OF_MODULE = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "kv_proj": "attention",
    "qkv_proj": "attention",
    "o_proj": "attention",
    "gate_proj": "ffn",
    "up_proj": "ffn",
    "gate_up_proj": "ffn",
    "down_proj": "ffn",
    "router": "router",
    "embed_tokens": "embedding",
    "lm_head": "head",
    "norm": "norm",
    "other": "other",
}
"""Every module type, with the block it belongs to."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor sits in a model.

    Attributes
    ----------
    layer : int or None
        The first number after ``layers.``, ``h.``, ``blocks.``, ``block.`` or ``layer.``; None outside the stack.
    tower : {"language", "vision", "projector"}
        Which part of a multimodal model; ``language`` for everything that is neither of the others.
    module_type : str
        A key of `BLOCK_OF_MODULE`.
    block : str
        Its value there.
    """

    layer: int | None
    tower: str
    module_type: str
    block: str


_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.([0-9]{1,9})(?=\.|$)")
_NUMBER = re.compile(r"(?:^|\.)[0-9]+(?=\.|$)")
# What an adapter adds after the module's own name: q_proj.lora_A.default.weight belongs to q_proj.
_ADAPTER = re.compile(r"\.(?:lora_|base_layer|modules_to_save|original_module|ia3_l|oft_|boft_).*$", re.DOTALL)
_PARAMETER = re.compile(
    r"weight|bias|gamma|beta|weight_[a-z_0-9]+|(?:input_|output_|[qkv]_)?scales?(?:_inv)?|qweight|qzeros|g_idx"
    r"|running_(?:mean|var)|num_batches_tracked|e_score_correction_bias"
)
# Fused parameters carry their role in their own name: experts.gate_up_proj_blocks, attn.in_proj_weight.
_FUSED = re.compile(r"(.+?)_(?:weight|bias|blocks|scales?(?:_inv)?)")
_NORM = re.compile(r"norm|(?:^|_)ln(?:_|[0-9]|$)")
# Parts of a name that say what is inside them; the last of them holds.
_ATTENTION = re.compile(r"attn|attention|(?:^|_)att$")
_FFN = re.compile(r"mlp|ffn|feed_?forward|moe|densereludense|(?:^|_)ff(?:_|[0-9]|$)")
# A mixture of experts calls its router a gate; elsewhere a gate is something else.
_WITH_EXPERTS = re.compile(rf"{_FFN.pattern}|expert|mixer")

_VISION = frozenset(
    (
        "visual",
        "vision",
        "vision_tower",
        "vision_model",
        "vision_encoder",
        "vision_backbone",
        "image_encoder",
        "vision_embed_tokens",
        "vit",
    )
)
_PROJECTOR = frozenset(
    (
        "multi_modal_projector",
        "mm_projector",
        "projector",
        "merger",
        "patch_merger",
        "deepstack_merger_list",
        "merger_list",
        "connector",
        "modality_projection",
        "visual_projection",
        "vision_language_adapter",
        "embed_vision",
        "resampler",
        "mlp1",
    )
)


def _by_word(words_of: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {word: module_type for module_type, words in words_of.items() for word in words}


# Last part of a module's name that says it all, whatever stands before.
_ALWAYS = _by_word(
    {
        "q_proj": ("q_proj", "q_a_proj", "q_b_proj", "q_attn", "q_lin", "wq", "to_q"),
        "k_proj": ("k_proj", "k_lin", "wk", "to_k"),
        "v_proj": ("v_proj", "v_lin", "wv", "to_v"),
        "kv_proj": ("kv_proj", "kv_a_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
        "qkv_proj": (
            "qkv_proj",
            "query_key_value",
            "qkv",
            "wqkv",
            "w_pack",
            "c_attn",
            "in_proj_qkv",
            "in_proj_qkvz",
        ),
        "o_proj": ("o_proj", "out_lin"),
        "gate_proj": ("gate_proj", "wi_0"),
        "up_proj": ("up_proj", "wi_1", "c_fc", "fc1", "fc_in", "lin1", "linear_fc1", "dense_h_to_4h"),
        "down_proj": ("down_proj", "fc2", "fc_out", "lin2", "linear_fc2", "dense_4h_to_h"),
        "gate_up_proj": ("gate_up_proj",),
        "router": ("shared_expert_gate",),
        "lm_head": ("lm_head", "embed_out", "vocab_projector"),
        "embed_tokens": (
            "embed_tokens",
            "embed_tokens_per_layer",
            "embed_positions",
            "embed_in",
            "wte",
            "wpe",
            "tok_embeddings",
            "word_embeddings",
            "shared",
            "cls_token",
            "pos_embed",
        ),
    }
)
# Words that are projections only inside attention (RWKV's feed_forward.key and Mamba's out_proj are not).
_IN_ATTENTION = _by_word(
    {
        "q_proj": ("q", "query", "query_proj", "input_linear"),
        "k_proj": ("k", "key", "key_proj"),
        "v_proj": ("v", "value", "value_proj"),
        "kv_proj": ("kv",),
        "qkv_proj": ("in_proj",),
        "o_proj": ("o", "wo", "out_proj", "to_out", "out", "c_proj", "proj", "dense", "output_linear"),
        "other": ("gate_proj",),  # which scales what attention gives, and has no name among the types
    }
)
# Words that are projections outside attention, in a layer's feed-forward part.
_IN_FFN = _by_word(
    {
        "gate_proj": ("w1",),
        "down_proj": ("w2", "wo", "c_proj"),
        "up_proj": ("w3", "v1", "wi"),
    }
)
# Where diffusers keeps the layers of a UNet, whose feed-forward parts are gated.
_UNET = frozenset(
    (
        "attentions",
        "temp_attentions",
        "motion_modules",
        "down_blocks",
        "mid_block",
        "up_blocks",
        "input_blocks",
        "middle_block",
        "output_blocks",
    )
)
_EMBEDDING_PARENTS = frozenset({"embeddings", "embedding", "patch_embed", "patch_embedding", "patch_embeddings"})


def locate(name: str, ndim: int | None = None) -> Place:
    """Find a tensor's place in its model by its name.

    Parameters
    ----------
    name : str
        The raw name.
    ndim : int, optional
        Its number of dimensions: a ``gate`` that is no matrix is a gating factor, not a router.

    Returns
    -------
    Place
        Multi-head latent attention's ``q_a_proj`` and ``q_b_proj`` are ``q_proj``; its ``kv_a_proj_with_mqa`` and
        ``kv_b_proj`` are ``kv_proj``. A bias, a scale or an adapter belongs to its module.

    Examples
    --------
    >>> locate("model.layers.3.self_attn.k_proj.bias")
    Place(layer=3, tower='language', module_type='k_proj', block='attention')
    """
    layer = _LAYER.search(name)
    tower, module_type = _role(_NUMBER.sub("", name), ndim is not None and ndim < 2)
    return Place(int(layer[1]) if layer else None, tower, module_type, BLOCK_OF_MODULE[module_type])


@lru_cache(maxsize=4096)
def _role(name: str, below_matrix: bool) -> tuple[str, str]:
    """Tower and module type of a name without its numbers: a model has few of those, however many layers."""
    parts = _ADAPTER.sub("", name).split(".")
    return _tower(parts), _module_type(parts, below_matrix)


def _tower(parts: list[str]) -> str:
    if not _PROJECTOR.isdisjoint(parts):
        return "projector"
    return "language" if _VISION.isdisjoint(parts) else "vision"


def _module_type(parts: list[str], below_matrix: bool) -> str:
    is_bias = parts[-1].endswith("bias")
    path = [part.lower() for part in parts]
    if len(path) > 1 and _PARAMETER.fullmatch(path[-1]):
        path.pop()
    elif fused := _FUSED.fullmatch(path[-1]):
        path[-1] = fused[1]
    *parents, last = path
    if _NORM.search(last):
        return "norm"
    if "router" in path:
        return "router"
    if "lm_head" in path or _is_output(path):
        return "lm_head"
    attention = _is_in_attention(parents, last)
    if "gate" in path and not attention and any(map(_WITH_EXPERTS.search, parents)):
        return "other" if last == "gate" and below_matrix and not is_bias else "router"
    if attention:
        # BERT: attention.output.dense; the feed-forward part has intermediate.dense and output.dense.
        return _IN_ATTENTION.get(last) or _ALWAYS.get(last, "other")
    if not _EMBEDDING_PARENTS.isdisjoint(path) or last.endswith(("_embedding", "_embeddings")):
        return "embed_tokens"
    if last == "dense" and parents:
        return {"intermediate": "up_proj", "output": "down_proj"}.get(parents[-1], "other")
    return _ALWAYS.get(last) or _in_ffn(parents, last, parts)


def _is_in_attention(parents: list[str], last: str) -> bool:
    """Whether a module is inside an attention part, and not inside a feed-forward part within a stack of such."""
    if "bottleneck" in parents or (last == "proj" and parents and not _ATTENTION.search(parents[-1])):
        return False  # MobileBERT's goes before attention, and attn.rel_logits_proj.proj beside it
    for part in reversed(parents):
        if _ATTENTION.search(part) or _FFN.search(part):
            return _ATTENTION.search(part) is not None
    return False


def _is_output(path: list[str]) -> bool:
    """Heads named by their place: ``output`` and ``head`` at the top, BERT's ``cls.predictions.decoder``."""
    return path in (["output"], ["model", "output"], ["head"]) or path[-2:] == ["predictions", "decoder"]


def _in_ffn(parents: list[str], last: str, parts: list[str]) -> str:
    inside = bool(parents) and _FFN.search(parents[-1]) is not None
    if last == "net" and inside:
        return "down_proj"
    if last == "proj" and parents[-1:] == ["net"] and any(map(_FFN.search, parents[:-1])):
        # The gate is fused in UNets. In most transformers of diffusers there is none, and names tell no more.
        return "up_proj" if _UNET.isdisjoint(parents) else "gate_up_proj"
    if inside and last in ("input_linear", "output_linear"):
        return "gate_up_proj" if last == "input_linear" else "down_proj"
    if parents[-1:] == ["mlp"]:
        if "Wi" in parts:
            # ModernBERT fuses the gate with the up projection under T5's name, but for the capital.
            return "gate_up_proj"
        if parents[-2:-1] == ["h"]:
            # Qwen's first generation gates by w2; everyone else gates by w1.
            return {"w1": "up_proj", "w2": "gate_proj", "c_proj": "down_proj"}.get(last, "other")
    return _IN_FFN.get(last, "other")
