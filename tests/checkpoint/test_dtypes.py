import re
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
from raw_safetensors import raw

from ckptdiff.checkpoint import DTYPES, Kind


def test_the_dtypes_are_those_the_safetensors_library_knows():
    entry = {"dtype": "NONE", "shape": [], "data_offsets": [0, 0]}
    with pytest.raises(safetensors.SafetensorError) as error:
        safetensors.deserialize(raw({"a": entry}))
    known = re.search("expected one of (.*)", str(error.value))[1]
    assert set(re.findall("`([A-Z0-9_]+)`", known)) == set(DTYPES)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=lambda dtype: dtype.name)
def test_the_safetensors_library_agrees_on_each_size(dtype):
    size = 24 * dtype.bits // 8
    entry = {"dtype": dtype.name, "shape": [24], "data_offsets": [0, size]}
    ((_, tensor),) = safetensors.deserialize(raw({"a": entry}, b"\0" * size))
    assert (tensor["dtype"], len(tensor["data"])) == (dtype.name, size)


def test_kinds():
    by_kind = {kind: {dtype.name for dtype in DTYPES.values() if dtype.kind is kind} for kind in Kind}
    assert by_kind[Kind.FLOAT] == {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
    assert by_kind[Kind.INTEGER] == {f"{sign}{bits}" for sign in "IU" for bits in (8, 16, 32, 64)} | {"BOOL"}
    assert by_kind[Kind.OPAQUE] == {
        "C64", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
    }  # fmt: skip


def test_numpy_agrees_on_the_bits():
    numpy_names = {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "C64": np.complex64,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu, "I8": np.int8, "U16": np.uint16, "I32": np.int32, "U64": np.uint64,
    }  # fmt: skip
    assert {name: DTYPES[name].bits for name in numpy_names} == {
        name: 8 * np.dtype(numpy_dtype).itemsize for name, numpy_dtype in numpy_names.items()
    }
    assert DTYPES["F64"].bits == 8 * struct.calcsize("d")
