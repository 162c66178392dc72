"""Quantised weights in every layout, with the values that other libraries decode them to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

E8M0 = torch.float8_e8m0fnu
E4M3 = torch.float8_e4m3fn


@dataclass
class Sample:
    """A weight as it is stored, and what it is worth."""

    tensors: dict[str, torch.Tensor]
    expected: np.ndarray
    encoding: str
    config: dict[str, Any] = field(default_factory=dict)
    ulps: int = 0
    """By how many units in the last place the oracle may differ: it rounds once more."""


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def fp8_codes(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """All codes but NaN."""
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes[codes & 0x7F == 0x7F] ^= 1
    return torch.from_numpy(codes).view(E4M3)


def fp8_scales(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """All positive values."""
    return torch.from_numpy(rng.integers(1, 0x7F, shape, dtype=np.uint8)).view(E4M3)


def packed_fp4(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))


def reals(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.exp(rng.normal(-4, 2, shape), dtype=np.float64, out=np.empty(shape)).astype(np.float32))


def powers(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.integers(1, 240, shape, dtype=np.uint8))


def up(size: int, block: int) -> int:
    return -(-size // block)


def spread(scales: np.ndarray, block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """A scale for each value."""
    return scales.repeat(block[0], -2).repeat(block[1], -1)[..., : shape[-2], : shape[-1]]


def values_of(codes: torch.Tensor) -> np.ndarray:
    return codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def fp4_values(packed: np.ndarray) -> np.ndarray:
    nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
    return nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32)


def grouped(config: dict[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": config}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def deepseek(rng: np.random.Generator, m: int, n: int) -> Sample:
    codes, scales = fp8_codes(rng, m, n), reals(rng, up(m, 128), up(n, 128))
    expected = values_of(codes) * spread(scales.numpy(), (128, 128), (m, n))
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return Sample({"a.weight": codes, "a.weight_scale_inv": scales}, expected, "FP8", config)


def deepseek_by_powers(rng: np.random.Generator, m: int, n: int) -> Sample:
    """Blocks that transformers can derive: no edge."""
    m, n = 8 * up(m, 8), 16 * up(n, 16)
    codes, scales = fp8_codes(rng, m, n), powers(rng, m // 8, n // 16).view(E8M0)
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32).numpy()
    config = {"quant_method": "fp8", "weight_block_size": [8, 16]}
    return Sample({"a.weight": codes, "a.scale": scales}, expected, "FP8", config)


def ct_fp8(strategy: str, **more: Any) -> Callable[[np.random.Generator, int, int], Sample]:
    def build(rng: np.random.Generator, m: int, n: int) -> Sample:
        shape = {"tensor": (1,), "channel": (m, 1), "block": (up(m, 8), up(n, 4))}[strategy]
        codes, scales = fp8_codes(rng, m, n), reals(rng, *shape)
        config = {"num_bits": 8, "type": "float", "strategy": strategy, **more}
        expected = dequantize(codes, scales, args=QuantizationArgs(**config)).numpy()
        return Sample({"a.weight": codes, "a.weight_scale": scales}, expected, "FP8", grouped(config))

    return build


def modelopt_fp8(rng: np.random.Generator, m: int, n: int) -> Sample:
    codes, scale = fp8_codes(rng, m, n), reals(rng)
    config = {"quant_method": "modelopt", "quant_algo": "FP8"}
    return Sample({"a.weight": codes, "a.weight_scale": scale}, values_of(codes) * scale.numpy(), "FP8", config)


def mxfp8(rng: np.random.Generator, m: int, n: int) -> Sample:
    codes, scales = fp8_codes(rng, m, n), powers(rng, m, up(n, 32))
    powers_of = scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = values_of(codes) * spread(powers_of, (1, 32), (m, n))
    config = grouped({"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32})
    return Sample({"a.weight": codes, "a.weight_scale": scales}, expected, "MXFP8", config)


def gpt_oss(rng: np.random.Generator, m: int, n: int) -> Sample:
    groups = up(n, 32)
    blocks, scales = packed_fp4(rng, 3, m, groups, 16), powers(rng, 3, m, groups)
    decoded = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    expected = decoded.transpose(1, 2).numpy()
    tensors = {"a.gate_up_proj_blocks": blocks, "a.gate_up_proj_scales": scales}
    return Sample(tensors, expected, "MXFP4", {"quant_method": "mxfp4"})


def ct_mxfp4(rng: np.random.Generator, m: int, n: int) -> Sample:
    groups = up(n, 32)
    packed, scales = packed_fp4(rng, m, 16 * groups), powers(rng, m, groups)
    config = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    fields = unpack_fp4_from_uint8(packed, m, 32 * groups, torch.float32)
    expected = dequantize(fields, scales.view(E8M0).float(), args=QuantizationArgs(**config)).numpy()
    return Sample({"a.weight_packed": packed, "a.weight_scale": scales}, expected, "MXFP4", grouped(config))


def ct_nvfp4(rng: np.random.Generator, m: int, n: int) -> Sample:
    groups = up(n, 16)
    packed, scales = packed_fp4(rng, m, 8 * groups), fp8_scales(rng, m, groups)
    factor = 1 / reals(rng, 1)
    config = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    fields = unpack_fp4_from_uint8(packed, m, 16 * groups, torch.float32)
    expected = dequantize(fields, scales.float(), args=QuantizationArgs(**config), global_scale=factor).numpy()
    tensors = {"a.weight_packed": packed, "a.weight_scale": scales, "a.weight_global_scale": factor}
    return Sample(tensors, expected, "NVFP4", grouped(config), ulps=1)


def modelopt_nvfp4(rng: np.random.Generator, m: int, n: int) -> Sample:
    groups = up(n, 16)
    packed, scales, factor = packed_fp4(rng, m, 8 * groups), fp8_scales(rng, m, groups), reals(rng)
    exact = fp4_values(packed.numpy()) * spread(values_of(scales), (1, 16), (m, 16 * groups))
    tensors = {"a.weight": packed, "a.weight_scale": scales, "a.weight_scale_2": factor}
    return Sample(tensors, exact * factor.numpy(), "NVFP4", {"quant_method": "modelopt", "quant_algo": "NVFP4"})


def ct_integers(bits: int, group: int | None, symmetric: bool) -> Callable[[np.random.Generator, int, int], Sample]:
    def build(rng: np.random.Generator, m: int, n: int) -> Sample:
        n = n if group is None else group * up(n, group)
        lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        codes = torch.from_numpy(rng.integers(lowest, highest, (m, n), dtype=np.int8, endpoint=True))
        scales = reals(rng, m, 1 if group is None else n // group)
        config = {"num_bits": bits, "type": "int", "symmetric": symmetric}
        config |= {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
        tensors = {"a.weight_packed": pack_to_int32(codes, bits), "a.weight_scale": scales}
        tensors["a.weight_shape"] = torch.tensor([m, n])
        zeros = None
        if not symmetric:
            zeros = torch.from_numpy(rng.integers(lowest, highest, tuple(scales.shape), dtype=np.int8, endpoint=True))
            tensors["a.weight_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0)
        fields = unpack_from_int32(tensors["a.weight_packed"], bits, (m, n))
        expected = dequantize(fields, scales, zeros, QuantizationArgs(**config)).numpy()
        return Sample(tensors, expected, f"INT{bits}", grouped(config))

    return build


def ct_bytes(rng: np.random.Generator, m: int, n: int) -> Sample:
    codes, scales = torch.from_numpy(rng.integers(-128, 128, (m, n), dtype=np.int8)), reals(rng, m, 1)
    config = {"num_bits": 8, "type": "int", "strategy": "channel"}
    expected = dequantize(codes, scales, args=QuantizationArgs(**config)).numpy()
    return Sample({"a.weight": codes, "a.weight_scale": scales}, expected, "INT8", grouped(config))


def fused_experts(rng: np.random.Generator, m: int, n: int) -> Sample:
    codes, scales = fp8_codes(rng, 3, m, n), reals(rng, 3, up(m, 8), up(n, 16))
    expected = values_of(codes) * spread(scales.numpy(), (8, 16), (3, m, n))
    config = {"quant_method": "fp8", "weight_block_size": [8, 16]}
    return Sample({"a.gate_up_proj": codes, "a.gate_up_proj_scale_inv": scales}, expected, "FP8", config)


def a_scale_for_each_expert(rng: np.random.Generator, m: int, n: int) -> Sample:
    codes, scales = fp8_codes(rng, 3, m, n), reals(rng, 3, 1, 1)
    return Sample({"a.down_proj": codes, "a.down_proj_scale": scales}, values_of(codes) * scales.numpy(), "FP8")


def fp4_in_bytes(kind: Callable[..., torch.Tensor], encoding: str) -> Callable[[np.random.Generator, int, int], Sample]:
    def build(rng: np.random.Generator, m: int, n: int) -> Sample:
        groups = up(n, 32)
        codes, scales = packed_fp4(rng, m, 16 * groups).view(torch.int8), kind(rng, m, groups)
        expected = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32).numpy()
        config = {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"}
        return Sample({"a.weight": codes, "a.weight_scale_inv": scales}, expected, encoding, config)

    return build


LAYOUTS: dict[str, Callable[[np.random.Generator, int, int], Sample]] = {
    "DeepSeek fp8": deepseek,
    "DeepSeek fp8, powers of two": deepseek_by_powers,
    "compressed-tensors fp8, one scale": ct_fp8("tensor"),
    "compressed-tensors fp8, a scale for a row": ct_fp8("channel"),
    "compressed-tensors fp8, blocks": ct_fp8("block", block_structure=[8, 4]),
    "ModelOpt fp8": modelopt_fp8,
    "MXFP8": mxfp8,
    "MXFP4 of GPT-OSS": gpt_oss,
    "MXFP4 of compressed-tensors": ct_mxfp4,
    "NVFP4 of compressed-tensors": ct_nvfp4,
    "NVFP4 of ModelOpt": modelopt_nvfp4,
    **{f"{bits} bits in words": ct_integers(bits, 8, symmetric=True) for bits in range(1, 9)},
    **{f"{bits} bits in words, zero points": ct_integers(bits, 8, symmetric=False) for bits in range(1, 9)},
    "4 bits in words, a scale for a row": ct_integers(4, None, symmetric=True),
    "3 bits in words, zero points for rows": ct_integers(3, None, symmetric=False),
    "8 bits in bytes": ct_bytes,
    "fp8 of fused experts": fused_experts,
    "fp8 with a scale for each expert": a_scale_for_each_expert,
    "E2M1 in I8": fp4_in_bytes(reals, "FP4"),
    "E2M1 in I8, powers of two": fp4_in_bytes(powers, "MXFP4"),
}
"""All rows of what is met in checkpoints: of about m rows and n columns."""
