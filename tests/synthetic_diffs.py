"""Synthetic Diffs, made without an engine; and without pytest, for processes that tests start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ckptdiff import __version__
from ckptdiff.checkpoint.names import locate
from ckptdiff.figures.catalogue import COLUMNS, flat_key
from ckptdiff.figures.result import Diff, TensorFacts
from ckptdiff.measure.thresholds import EPS, RHO, TAU, P
from ckptdiff.options import Options

_BYTES = {"BF16": 2, "F32": 4, "F16": 2, "I64": 8, "I32": 4, "U8": 1}
_MODULES = {
    "self_attn.q_proj": (512, 512, 0.86),
    "self_attn.k_proj": (128, 512, 0.88),
    "self_attn.v_proj": (128, 512, 0.84),
    "self_attn.o_proj": (512, 512, 0.85),
    "mlp.gate_proj": (1408, 512, 0.74),
    "mlp.up_proj": (1408, 512, 0.73),
    "mlp.down_proj": (512, 1408, 0.71),
}


def tensor_facts(name: str, shape: Sequence[int], **changes: Any) -> TensorFacts:
    place = locate(name, len(shape))
    facts = TensorFacts(
        name=name,
        shape=tuple(shape),
        dtype_base="BF16",
        dtype_tuned="BF16",
        compare="bf16",
        layer=place.layer,
        tower=place.tower,
        module_type=place.module_type,
        block=place.block,
    )
    return replace(facts, **changes)


def llama_facts(layers: int) -> list[tuple[TensorFacts, float]]:
    """Facts of a small Llama and the share of each tensor that is unchanged."""
    tensors = [(tensor_facts("model.embed_tokens.weight", (4096, 512)), 0.97)]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors.append((tensor_facts(f"{prefix}.input_layernorm.weight", (512,)), 1.0))
        for module, (rows, width, unchanged) in _MODULES.items():
            later = 0.1 * layer / max(1, layers - 1)
            tensors.append((tensor_facts(f"{prefix}.{module}.weight", (rows, width)), unchanged - later))
    return [*tensors, (tensor_facts("model.norm.weight", (512,)), 1.0)]


def columns_of(tensors: Sequence[tuple[TensorFacts, float]], seed: int = 7) -> dict[str, np.ndarray]:
    """Columns that a run could have measured: consistent with each other, not with any data."""
    rng = np.random.default_rng(seed)
    columns = {column.name: np.zeros(len(tensors), column.dtype) for column in COLUMNS}
    for row, (facts, unchanged) in enumerate(tensors):
        numel = math.prod(facts.shape)
        valued = facts.compare != "bitwise"
        equal = round(numel * unchanged)
        wide = valued and {facts.dtype_base, facts.dtype_tuned} & {"F64", "F32", "F16"} and facts.compare == "bf16"
        step = 2e-4 * rng.uniform(0.5, 1.5)
        cells: dict[str, float] = {
            "numel": numel,
            "valued": valued,
            "finite": numel,
            "unchanged_bitwise": equal,
            "wide": bool(wide),
            "off_grid": numel if wide else 0,
            "unchanged_stored": equal // 50 if wide else equal,
            "unchanged_eta": equal,
            "changed": (numel - equal) * 9 // 10,
            "masked": 1,
            "support": numel - equal,
            "delta_norm": step * math.sqrt(numel - equal),
            "base_norm": 0.02 * math.sqrt(numel),
            "base_dot_delta": 1e-7 * numel * rng.normal(),
            "delta_sum": 1e-9 * numel * rng.normal(),
            "l1": 0.8 * step * (numel - equal),
            "max_abs": 20 * step if equal < numel else 0.0,
            "unchanged_null": min(1.0, unchanged * 0.97),
            "stored_norm": 1.1 * step * math.sqrt(numel - equal),
            "absorbed_norm": 0.4 * step * math.sqrt(numel - equal) if wide else 0.0,
        }
        cells |= {flat_key("unchanged_abs", eps): equal + (numel - equal) * i // 10 for i, eps in enumerate(EPS)}
        cells |= {flat_key("unchanged_rel", tau): equal + (numel - equal) * i // 4 for i, tau in enumerate(TAU)}
        moved = equal < numel
        cells |= {flat_key("coord_energy", p): 0.02 + p / 10 if moved else math.nan for p in P}
        cells |= {flat_key("low_coverage", rho): min(1.0, 3.1 * rho) if moved else math.nan for rho in RHO}
        cells |= {flat_key("low_coverage_null", rho): min(1.0, 3.8 * rho) if moved else math.nan for rho in RHO}
        if not valued:
            kept = {"numel", "unchanged_bitwise", "changed", "masked"}
            cells = {
                k: (v if k in kept else 0 if columns[k].dtype == np.uint64 else math.nan) for k, v in cells.items()
            }
        for name, value in cells.items():
            columns[name][row] = value
    return columns


def build_diff(tensors: Sequence[tuple[TensorFacts, float]], **changes: Any) -> Diff:
    """A Diff of facts, each with its unchanged share; `changes` replace attributes of the result."""

    def side(path: str, key: str) -> dict[str, Any]:
        numels = [math.prod(facts.shape) for facts, _ in tensors]
        dtypes = [getattr(facts, key) for facts, _ in tensors]
        return {
            "path": path,
            "tensors": len(tensors),
            "numel": sum(numels),
            "bytes": sum(n * _BYTES[dtype] for n, dtype in zip(numels, dtypes, strict=True)),
            "dtypes": sorted(set(dtypes)),
            "shards": [],
            "uncompared": [],
        }

    diff = Diff(
        tensors=tuple(facts for facts, _ in tensors),
        columns=columns_of(tensors),
        base=side("models/Llama-small", "dtype_base"),
        tuned=side("models/Llama-small-OPD", "dtype_tuned"),
        compare="bf16",
        mask_rule="abs:1e-05",
        options=Options().as_json(),
        ckptdiff_version=__version__,
    )
    return replace(diff, **changes)
