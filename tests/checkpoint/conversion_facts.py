"""List the rules by which transformers converts checkpoints when it reads them; as a script, print them."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from transformers import conversion_mapping
from transformers.core_model_loading import WeightConverter

EXPERTS = 4
OUT, IN = 6, 10


@dataclass(frozen=True)
class Fact:
    """A rule, and the keys of the mapping that have it."""

    models: tuple[str, ...]
    rule: object

    @property
    def kind(self) -> str:
        return type(self.rule).__name__

    def __str__(self) -> str:
        steps = [f"{type(step).__name__}{vars(step)}" for step in getattr(self.rule, "operations", ())]
        return f"{' + '.join(self.rule.source_patterns)} -> {' + '.join(self.rule.target_patterns)} {' '.join(steps)}"


def facts() -> list[Fact]:
    """Every rule once."""
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    models = defaultdict(dict)
    rules = {}
    for model, listed in conversion_mapping._checkpoint_conversion_mapping_cache.items():
        for rule in listed:
            key = (type(rule).__name__, str(Fact((), rule)))
            models[key][model] = None
            rules.setdefault(key, rule)
    return [Fact(tuple(models[key]), rule) for key, rule in rules.items()]


def is_converter(fact: Fact) -> bool:
    return isinstance(fact.rule, WeightConverter)


def names_of(pattern: str, before: str, after: str) -> list[str]:
    """Names that a pattern of tensors fits, for each expert one."""
    plain = before + pattern.replace("\\", "").removeprefix("^").strip(".") + after
    return [plain.replace("*", str(expert)) for expert in range(EXPERTS)] if "*" in plain else [plain]


def sides_of(fact: Fact) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Random tensors for a converter's sources, and what it makes of them."""
    rule = fact.rule
    patterns = [*rule.source_patterns, *rule.target_patterns]
    before = "model.layers.7." + ("self_attn." if rule.target_patterns[0].lstrip(".").startswith("q_proj") else "")
    bare = not any(re.search("weight|bias|experts|embedding", pattern) for pattern in patterns)
    after = ".weight" if bare else ""
    collected, sources = {}, {}
    generator = torch.Generator().manual_seed(0)
    for pattern in rule.source_patterns:
        names = names_of(pattern, before, after)
        tensors = [torch.randn(_shape(pattern, len(patterns)), generator=generator) for _ in names]
        collected[pattern] = tensors
        sources |= dict(zip(names, tensors, strict=True))
    result = dict(collected)
    for step in rule.operations:
        result = step.convert(
            result,
            source_patterns=rule.source_patterns,
            target_patterns=rule.target_patterns,
            full_layer_name=rule.target_patterns[0],
            model=SimpleNamespace(get_parameter=_parameter),
            config=None,
        )
    targets = {}
    for pattern, made in result.items():
        (name,) = names_of(pattern, before, after)
        targets[name] = made[0] if isinstance(made, list) else made
    if "experts.w13" in before + patterns[0].replace("\\", ""):
        # One of two fused tensors alone does not tell its axes apart: its neighbour does.
        end = "_scale" if "scale" in patterns[0] else ""
        down = torch.randn(EXPERTS, IN, 6, generator=generator)
        sources[f"{before}mlp.experts.w2_weight{end}"] = down
        targets[f"{before}mlp.experts.down_proj{end and '_scale_inv'}"] = down
    return sources, targets


def renamed(fact: Fact) -> tuple[str, str]:
    """A name that a rule changes, and what it becomes."""
    pattern = fact.rule.source_patterns[0]
    start = "" if pattern.startswith(("^", "(^", "model")) else "layers.7."
    name = pattern.replace(r"\d+", "3").replace("(^|model\\.)", "")
    name = re.sub(r"\(\?.*?\)\)?", "", name)
    name = re.sub(r"\(([^|()]*)[^()]*\)", r"\1", name).replace(".+", "x")
    name = start + re.sub(r"\[(.)[^]]*\]", r"\1", name).replace("\\", "").replace("^", "").replace("*", "5").lstrip(".")
    if not re.search(r"(weight|bias|gamma|beta|log|sinks?|token|table|base|scale|fn|offset|inv)$", name):
        name = name.rstrip(".") + ".weight"
    return name, fact.rule.rename_source_key(name)[0]


def _shape(pattern: str, count: int) -> tuple[int, ...]:
    """A shape that fits a source: 12 rows can be cut in two, three or four."""
    if "conv1d" in pattern:
        return (OUT, 1, 4)
    if "bias" in pattern:
        return (12,)
    stacked = ("experts" in pattern or "moe." in pattern or "shared_w13" in pattern) and "*" not in pattern
    return (EXPERTS, 12, IN) if stacked else (12, IN)


def _parameter(name: str) -> torch.Tensor:
    """A parameter of the model: q has more rows than k and v, and experts come as [E, in, out]."""
    if "experts" in name:
        return torch.empty(EXPERTS, IN, 12)
    return torch.empty(6 if "q_proj" in name else 3, IN)


if __name__ == "__main__":
    for fact in facts():
        print(f"{fact.kind}: {fact}  [{len(fact.models)}: {' '.join(fact.models[:4])}]")
