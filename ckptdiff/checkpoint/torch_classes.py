"""List what state dicts and the metadata of torch.distributed.checkpoint are made of.

The names are those of torch 2.13, and those by which versions before it called the same things.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["KNOWN_CLASSES", "STORAGE_DTYPES", "TORCH_DTYPES"]

TORCH_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "torch.float64": "F64",
        "torch.float32": "F32",
        "torch.float16": "F16",
        "torch.bfloat16": "BF16",
        "torch.float8_e4m3fn": "F8_E4M3",
        "torch.float8_e5m2": "F8_E5M2",
        "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
        "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
        "torch.float8_e8m0fnu": "F8_E8M0",
        "torch.int64": "I64",
        "torch.int32": "I32",
        "torch.int16": "I16",
        "torch.int8": "I8",
        "torch.uint64": "U64",
        "torch.uint32": "U32",
        "torch.uint16": "U16",
        "torch.uint8": "U8",
        "torch.bool": "BOOL",
        "torch.complex64": "C64",
    }
)
"""What torch calls the dtypes of the safetensors format whose elements are whole bytes."""

STORAGE_DTYPES: Mapping[str, str | None] = MappingProxyType(
    {
        "DoubleStorage": "F64",
        "FloatStorage": "F32",
        "HalfStorage": "F16",
        "BFloat16Storage": "BF16",
        "LongStorage": "I64",
        "IntStorage": "I32",
        "ShortStorage": "I16",
        "CharStorage": "I8",
        "ByteStorage": "U8",
        "BoolStorage": "BOOL",
        "ComplexFloatStorage": "C64",
        "UntypedStorage": None,
    }
)
"""Dtype of each class of storages; an untyped one holds bytes, and its tensor tells."""


def _names(*names: str) -> frozenset[str]:
    return frozenset(names)


_DTYPES = frozenset(name.removeprefix("torch.") for name in TORCH_DTYPES)
_OTHER_DTYPES = _names("complex32", "complex128", "float4_e2m1fn_x2", "ComplexDoubleStorage")
"""Known as classes, so that the tensor which has one can be named."""
_STORAGES = frozenset(STORAGE_DTYPES)
_PLACEMENTS = _names("Shard", "Replicate", "Partial", "_Partial", "_StridedShard", "DTensorSpec", "TensorMeta")
_DTENSOR = "torch.distributed.tensor", "torch.distributed._tensor"
_SHARDED = "torch.distributed._shard"

KNOWN_CLASSES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "builtins": _names(
            *(
                "set",
                "frozenset",
                "bytearray",
                "bytes",
                "list",
                "dict",
                "tuple",
                "int",
                "float",
                "bool",
                "str",
                "getattr",
            )
        ),
        "collections": _names("OrderedDict", "defaultdict"),
        "_codecs": _names("encode"),
        "pathlib": _names("PosixPath", "PurePosixPath", "Path"),
        "torch": _DTYPES | _OTHER_DTYPES | _STORAGES | {"Size", "device", "Tensor"},
        "torch.storage": _STORAGES,
        "torch.serialization": _names("_get_layout"),
        "torch.nn.parameter": _names("Parameter", "Buffer"),
        "torch._tensor": _names("_rebuild_from_type_v2"),
        "torch._utils": _names(
            "_rebuild_tensor",
            "_rebuild_tensor_v2",
            "_rebuild_tensor_v3",
            "_rebuild_parameter",
            "_rebuild_parameter_with_state",
            "_rebuild_wrapper_subclass",
            "_rebuild_meta_tensor_no_storage",
        ),
        **{f"{package}{module}": _names("DTensor") for package in _DTENSOR for module in ("", ".api", "._api")},
        **{f"{package}.placement_types": _PLACEMENTS for package in _DTENSOR},
        "torch.distributed.tensor._dtensor_spec": _names("DTensorSpec", "TensorMeta", "ShardOrderEntry"),
        "torch.distributed.device_mesh": _names("DeviceMesh"),
        "torch.distributed._tensor.device_mesh": _names("DeviceMesh"),
        "torch.distributed._mesh_layout": _names("_FlatLayout", "_MeshLayout"),
        "torch.distributed.remote_device": _names("_remote_device"),
        f"{_SHARDED}.metadata": _names("ShardMetadata"),
        f"{_SHARDED}.sharding_spec.api": _names("EnumerableShardingSpec"),
        f"{_SHARDED}.sharding_spec.chunk_sharding_spec": _names("ChunkShardingSpec"),
        f"{_SHARDED}.sharded_tensor.api": _names("ShardedTensor", "ShardedTensor.ProcessGroupState"),
        f"{_SHARDED}.sharded_tensor.shard": _names("Shard"),
        f"{_SHARDED}.sharded_tensor.metadata": _names(
            "ShardedTensorMetadata", "TensorProperties", "MEM_FORMAT_ENCODING"
        ),
        "torch.distributed.checkpoint.metadata": _names(
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": _names("_StorageInfo"),
    }
)
"""Classes and functions that a pickle may name, by module. None of them is ever imported or called."""
