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
FUSED_EXPERTS = {"jamba": _PROJ, "lfm2_moe": _W, "qwen2_moe": _PROJ}
"""By ``model_type``, the same of models whose fused parameters PEFT has to be told of, and then stacks factors for."""

_IN_OUT = ("gpt_oss", "openai_privacy_filter", "aria")
"""Values of ``model_type`` whose stacked experts are [experts, in, out] to PEFT."""
_PAST_DT_PROJ = ("falcon_mamba", "jamba", "mamba")
"""Values of ``model_type`` whose mixers multiply with the weight of ``dt_proj`` themselves: no adapter is asked."""
_MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


@dataclass(frozen=True, slots=True)
class Adapted:
    """A model to be adapted.

    Attributes
    ----------
    model_type : str
        Of its ``config.json``; empty without one.
    conv1d : bool
        Its layers called ``c_attn``, ``c_fc`` and ``c_proj`` store [in, out], as GPT-2's.
    """

    model_type: str
    conv1d: bool

    @classmethod
    def of(cls, file: str, weights: Iterable[tuple[str, Sequence[int]]]) -> Adapted:
        """Look at the configuration beside a file of a checkpoint, and at the names and shapes of its weights."""
        kind = config_beside(file).values.get("model_type")
        # In GPT-2's names these layers widen: with columns for outputs they are wide.
        in_out = any(name.endswith(_WIDENING) and len(shape) == 2 and shape[0] < shape[1] for name, shape in weights)
        return cls(kind if isinstance(kind, str) else "", in_out)

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

    def way(self, name: str, shape: Sequence[int], floating: bool, method: Method) -> tuple[Way | None, str]:
        """How PEFT adapts a tensor; or None, and why it does not."""
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
            if "block_sparse_moe." in name:
                return None, "a router, which the model has under another name"
            return "parameter", ""
        return "linear", ""

    def _of_expert(self, last: str, method: Method) -> tuple[Way | None, str]:
        if method == "shira":
            return None, "an expert, which models have fused and SHiRA has no layer for"
        if last in self.merged:
            return ("expert" if self.model_type in MERGED_EXPERTS else "fused"), ""
        return None, "an expert, which PEFT drops where the model has fused them"
