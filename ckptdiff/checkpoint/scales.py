"""Find fp8 tensors with scales beside them: their codes alone are not the values that a model multiplies with."""

from __future__ import annotations

from collections.abc import Iterable

from ckptdiff.checkpoint.dtypes import Kind
from ckptdiff.checkpoint.header import TensorInfo

__all__ = ["is_scaled", "scaled_modules"]


def scaled_modules(names: Iterable[str]) -> frozenset[str]:
    """Names of the modules, or of the fused tensors, that a checkpoint of these tensors holds scales for."""
    split = (name.rpartition(".") for name in names if "scale" in name)
    return frozenset(module for module, _, parameter in split if "scale" in parameter)


def is_scaled(tensor: TensorInfo, modules: frozenset[str]) -> bool:
    """Whether a tensor is fp8 and belongs to one of those."""
    is_fp8 = tensor.kind is Kind.FLOAT and tensor.dtype.startswith("F8_")
    return is_fp8 and (tensor.name.rpartition(".")[0] in modules or tensor.name in modules)
