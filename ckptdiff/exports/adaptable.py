"""Say which tensors of a model PEFT can adapt, and how: facts of PEFT 0.21 and transformers 5."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ckptdiff.checkpoint.model_config import config_beside
from ckptdiff.checkpoint.names import locate

__all__ = ["FUSED_EXPERTS", "MERGED_EXPERTS", "Adapted", "Method", "Way"]

Method: TypeAlias = Literal["lora", "shira"]
Way: TypeAlias = Literal["linear", "conv1d", "expert", "fused", "router", "parameter", "stack"]
"""The module is a linear layer, or one with its weight stored [in, out]; one of experts whose factors PEFT stacks, by
itself, or if it is told of the parameter that the model has for all; the router beside the former; a parameter of a
module of another kind, a matrix, or one for each expert."""

_EMBEDDINGS = ("embed", "wte", "wpe", "relative_attention_bias")
_CONV1D = ("c_attn", "c_proj", "c_fc")
_WIDENING = ("c_attn.weight", "c_fc.weight")
_EXPERT = re.compile(r"\.experts\.[0-9]+\.")
_STACK = re.compile(r"\.experts\.(?:gate_up_proj|down_proj)$")

_W = ("w1", "w2", "w3")
_PROJ = ("gate_proj", "up_proj", "down_proj")
_LIKE_MIXTRAL = "mixtral minimax minimax_m2"
_LIKE_QWEN = """
    afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe
    glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe longcat_flash mellum olmoe qwen3_moe qwen3_next qwen3_omni_moe
    qwen3_omni_moe_text qwen3_omni_moe_thinker solar_open
"""
MERGED_EXPERTS = {**dict.fromkeys(_LIKE_MIXTRAL.split(), _W), **dict.fromkeys(_LIKE_QWEN.split(), _PROJ)}
"""By ``model_type``, the names of matrices of experts that PEFT stacks, as the model does; wherever else in such a
model a module has one of these names, PEFT takes it for an expert's."""
FUSED_EXPERTS = {"jamba": _PROJ, "lfm2_moe": _W, "phimoe": _W, "qwen2_moe": _PROJ}
"""By ``model_type``, the same of models whose fused parameters PEFT has to be told of, and then stacks factors for."""

_IN_OUT = ("gpt_oss", "openai_privacy_filter", "aria")
"""Values of ``model_type`` whose stacked experts are [experts, in, out] to PEFT."""
_PAST_DT_PROJ = ("falcon_mamba", "jamba", "mamba")
"""Values of ``model_type`` whose mixers multiply with the weight of ``dt_proj`` themselves: no adapter is asked."""
_MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")

_TOWERS = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^(vision_tower|audio_tower|multi_modal_projector)\.", r"model.\1."),
)
_QWEN_VL = ((r"^model\.(?!visual\.|language_model\.)", "model.language_model."), (r"^visual\.", "model.visual."))
_ATTENTION = (
    (r"(?<=\.attention\.)(?:attention|self)\.([qkv])(?:uery|ey|alue)\.", r"\1_proj."),
    (r"(?<=\.attention\.)output\.dense\.", "o_proj."),
)
_BLOCK = (*_ATTENTION, (r"(?<=\.)intermediate\.dense\.", "mlp.fc1."), (r"(?<=\.)output\.dense\.", "mlp.fc2."))
_LAYER = (*_BLOCK, (r"encoder\.layer\.", "layers."))
_STAGE = (
    *((r"(?<=\.mlp\.)dense(?=[12]\.)", "fc"), (r"encoder\.block\.([0-9]+)\.", r"stages.\1.blocks.")),
    *_ATTENTION,
)
_MOE = (r"\.block_sparse_moe\.", ".mlp.")
_GRANITE = (
    (r"(?<=\.block_sparse_moe\.)input_linear\.weight$", "experts.gate_up_proj"),
    (r"(?<=\.block_sparse_moe\.)output_linear\.weight$", "experts.down_proj"),
    (r"(?<=\.block_sparse_moe\.router\.)layer\.", ""),
)
_CALLED: dict[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(("aya_vision", "gemma3", "internvl", "llava", "mistral3", "paligemma", "vipllava"), _TOWERS),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN_VL),
    **dict.fromkeys(("vit", "vit_mae"), _LAYER),
    **dict.fromkeys(("granitemoe", "granitemoehybrid", "granitemoeshared"), _GRANITE),
    "detr": ((r"\.out_proj\.", ".o_proj."), (r"(?<=layers\.)([0-9]+)\.(?=fc[12]\.)", r"\1.mlp.")),
    "dinov2": _ATTENTION,
    "dinov3_vit": ((r"^layer\.", "model.layer."),),
    "kimi_linear": (_MOE, (r"(?<=\.self_attn\.)(?=f_[ab]_proj\.)", "forget_gate.")),
    "nemotron_h": ((r"^backbone\.", "model."),),
    "phimoe": (_MOE, (r"(?<=\.mlp\.)gate\.", "router.")),
    "qwen2_audio": _TOWERS,
    "segformer": _STAGE,
    "swin": _BLOCK,
}
"""By ``model_type``, expressions of names that checkpoints have and the modules of transformers 5 do not, and what they
become, in order; where the first finds nothing, a checkpoint has the names of modules. PEFT looks for these, and says
nothing of some that are not there."""


@dataclass(frozen=True, slots=True)
class Adapted:
    """A model to be adapted.

    Attributes
    ----------
    model_type : str
        Of its ``config.json``; empty without one.
    conv1d : bool
        Its layers called ``c_attn``, ``c_fc`` and ``c_proj`` store [in, out], as GPT-2's.
    renames : tuple of (str, str)
        Expressions of names in the checkpoint, and what the model has in their place.
    """

    model_type: str
    conv1d: bool
    renames: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, file: str, weights: Iterable[tuple[str, Sequence[int]]]) -> Adapted:
        """Look at the configuration beside a file of a checkpoint, and at the names and shapes of its weights."""
        found, weights = config_beside(file).values.get("model_type"), list(weights)
        kind = found if isinstance(found, str) else ""
        # In GPT-2's names these layers widen: with columns for outputs they are wide.
        in_out = any(name.endswith(_WIDENING) and len(shape) == 2 and shape[0] < shape[1] for name, shape in weights)
        renames = _CALLED.get(kind, ())
        old = any(re.search(pattern, name) for pattern, _ in renames[:1] for name, _ in weights)
        return cls(kind, in_out, renames if old else ())

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of matrices of experts that PEFT stacks; none where it does not."""
        return (MERGED_EXPERTS | FUSED_EXPERTS).get(self.model_type, ())

    @property
    def stacks_in_out(self) -> bool:
        """Whether PEFT takes stacked experts as [experts, in, out]."""
        return self.model_type in _IN_OUT

    def is_merged(self, name: str) -> bool:
        """Whether PEFT stacks the factors of a tensor, one of an expert, with those of others."""
        return bool(_EXPERT.search(name)) and name.removesuffix(".weight").rpartition(".")[2] in self.merged

    def called(self, name: str) -> str:
        """What the model calls what a checkpoint calls so."""
        for pattern, becomes in self.renames:
            name = re.sub(pattern, becomes, name)
        return name

    def way(self, name: str, shape: Sequence[int], floating: bool, method: Method) -> tuple[Way | None, str]:
        """How PEFT adapts what the model calls so; or None, and why it does not."""
        module, last = name.removesuffix(".weight"), name.removesuffix(".weight").rpartition(".")[2]
        if not floating:
            return None, "no floating values"
        if len(shape) < 2:
            return None, "a bias" if name.endswith("bias") else "a vector"
        if not min(shape):
            return None, "no values"
        if len(shape) > 2:
            if len(shape) > 3 or not _STACK.search(name):
                return None, "not a matrix"
            return ("stack", "") if method == "lora" else (None, "fused experts, which SHiRA has no layer for")
        if module == name:
            return None, "not the weight of a module"
        place = locate(name)
        if place.block == "embedding" or any(part in last.lower() for part in _EMBEDDINGS):
            return None, "an embedding"
        if last in _CONV1D and self.conv1d:
            return ("conv1d", "") if method == "lora" else (None, "stored transposed (Conv1D)")
        if _EXPERT.search(name):
            return self._of_expert(last, method)
        known = self.model_type in MERGED_EXPERTS
        if method == "lora" and known and last in self.merged:
            return None, "of a name that PEFT takes for an expert's"
        if method == "lora" and self.model_type in _MAMBA and last in ("out_proj", "conv1d"):
            return None, f"refused by PEFT in models of type {self.model_type}"
        if self.model_type in _PAST_DT_PROJ and last == "dt_proj":
            return None, "a weight that the model uses past its layer"
        if place.module_type == "router" and last != "shared_expert_gate":
            if method == "shira":
                return None, "a router, which need not be a linear layer"
            if known and last == "gate":
                return "router", ""
            return "parameter", ""
        return "linear", ""

    def _of_expert(self, last: str, method: Method) -> tuple[Way | None, str]:
        if method == "shira":
            return None, "an expert, which models have fused and SHiRA has no layer for"
        if last in self.merged:
            return ("expert" if self.model_type in MERGED_EXPERTS else "fused"), ""
        return None, "an expert, which PEFT drops where the model has fused them"
