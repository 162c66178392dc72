"""Call the routine of cuSOLVER that finds a part of the eigenpairs, which CuPy does not call.

Its library is the one that CuPy has loaded, and so are its handle and stream.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np

from ckptdiff.linalg.library import Array

_VECTORS, _BY_PLACE, _UPPER = 1, 1002, 1
"""CUSOLVER_EIG_MODE_VECTOR, CUSOLVER_EIG_RANGE_I, CUBLAS_FILL_MODE_UPPER."""
_REAL = {4: 0, 8: 1}
"""CUDA_R_32F and CUDA_R_64F, by item size."""
_Address, _Long = ctypes.c_void_p, ctypes.c_int64


@cache
def _library() -> Any:
    from cuda.pathfinder import load_nvidia_dynamic_lib

    return ctypes.CDLL(load_nvidia_dynamic_lib("cusolver").abs_path)


def eigenpairs(cupy: Any, matrix: Array, first: int, last: int) -> tuple[Array, Array]:
    """Some eigenpairs of a symmetric matrix on the GPU, by Xsyevdx.

    The lower triangle of the C-contiguous CuPy array is read, and all of it overwritten; cuSOLVER sees the transpose.
    Places `first` to `last`, both included, count in ascending order, and so do the values; vectors are the columns of
    shape (n, count).

    Raises
    ------
    numpy.linalg.LinAlgError
        If it finds none.
    RuntimeError
        If it cannot be called so.
    """
    from cupy_backends.cuda.libs import cusolver

    n, count, kind = matrix.shape[0], last - first + 1, _REAL[matrix.dtype.itemsize]
    handle = cupy.cuda.Device().cusolver_handle
    cusolver.setStream(handle, cupy.cuda.get_current_stream().ptr)
    values, info = cupy.empty(n, matrix.dtype), cupy.zeros(1, np.int32)
    found, on_device, on_host = ctypes.c_int64(0), ctypes.c_size_t(0), ctypes.c_size_t(0)
    nothing = _Address(None)
    params = cusolver.createParams()
    try:
        asked = (
            *(_Address(handle), _Address(params), _VECTORS, _BY_PLACE, _UPPER),
            *(_Long(n), kind, _Address(matrix.data.ptr), _Long(n)),
            *(nothing, nothing, _Long(first + 1), _Long(last + 1), ctypes.byref(found)),
            *(kind, _Address(values.data.ptr), kind),
        )
        sizes = ctypes.byref(on_device), ctypes.byref(on_host)
        _require("cusolverDnXsyevdx_bufferSize", _library().cusolverDnXsyevdx_bufferSize(*asked, *sizes))
        device_work = cupy.empty(max(on_device.value, 1), np.uint8)
        host_work = np.empty(max(on_host.value, 1), np.uint8)
        work = (
            *(_Address(device_work.data.ptr), on_device, _Address(host_work.ctypes.data), on_host),
            _Address(info.data.ptr),
        )
        _require("cusolverDnXsyevdx", _library().cusolverDnXsyevdx(*asked, *work))
        failed = int(info.get()[0])  # which waits: nothing above is freed while it is used
    finally:
        cusolver.destroyParams(params)
    if failed or found.value != count:
        raise np.linalg.LinAlgError(f"cuSOLVER found {found.value} of {count} eigenpairs: info {failed}")
    return values[:count], matrix[:count].T


def _require(name: str, status: int) -> None:
    if status:
        raise RuntimeError(f"{name} failed: CUSOLVER_STATUS {status}")
