"""Call the routines of cuSOLVER that CuPy does not: for a part of the eigenpairs, and for those of many matrices.

Its library is the one that CuPy has loaded, and so are its handle and stream.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.linalg.library import Array

_NO_VECTORS, _VECTORS, _BY_PLACE, _UPPER = 0, 1, 1002, 1
"""CUSOLVER_EIG_MODE_NOVECTOR and _VECTOR, CUSOLVER_EIG_RANGE_I, CUBLAS_FILL_MODE_UPPER."""
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
    n, count, kind = matrix.shape[0], last - first + 1, _REAL[matrix.dtype.itemsize]
    values, found = cupy.empty(n, matrix.dtype), ctypes.c_int64(0)
    nothing = _Address(None)
    asked = (
        *(_VECTORS, _BY_PLACE, _UPPER, _Long(n), kind, _Address(matrix.data.ptr), _Long(n)),
        *(nothing, nothing, _Long(first + 1), _Long(last + 1), ctypes.byref(found)),
        *(kind, _Address(values.data.ptr), kind),
    )
    (failed,) = _called(cupy, "cusolverDnXsyevdx", asked, (), 1)
    if failed or found.value != count:
        raise np.linalg.LinAlgError(f"cuSOLVER found {found.value} of {count} eigenpairs: info {failed}")
    return values[:count], matrix[:count].T


def eigenpairs_of_each(cupy: Any, matrices: Array, *, vectors: bool = True) -> tuple[Array, Array]:
    """All eigenpairs of each matrix of a stack, or their values alone, by XsyevBatched (cuSOLVER 11.7.1 or newer).

    As :func:`eigenpairs`, of shape (members, n, n): values come as (members, n), vectors as the columns of a stack.
    """
    members, n, kind = matrices.shape[0], matrices.shape[-1], _REAL[matrices.dtype.itemsize]
    values = cupy.empty((members, n), matrices.dtype)
    asked = (
        *(_VECTORS if vectors else _NO_VECTORS, _UPPER, _Long(n), kind, _Address(matrices.data.ptr), _Long(n)),
        *(kind, _Address(values.data.ptr), kind),
    )
    failed = _called(cupy, "cusolverDnXsyevBatched", asked, (_Long(members),), members)
    if failed.any():
        which = int(failed.nonzero()[0][0])
        raise np.linalg.LinAlgError(
            f"cuSOLVER found no eigenpairs of {np.count_nonzero(failed)} of {members} matrices: "
            f"info {failed[which]} of number {which}"
        )
    return values, matrices.mT


def _called(cupy: Any, name: str, asked: tuple[Any, ...], last: tuple[Any, ...], problems: int) -> NDArray[np.int32]:
    """Call a routine with room to work, and tell what it says of each problem; `last` are its last arguments."""
    from cupy_backends.cuda.libs import cusolver

    handle = cupy.cuda.Device().cusolver_handle
    cusolver.setStream(handle, cupy.cuda.get_current_stream().ptr)
    info = cupy.zeros(problems, np.int32)
    on_device, on_host = ctypes.c_size_t(0), ctypes.c_size_t(0)
    params = cusolver.createParams()
    try:
        asked = _Address(handle), _Address(params), *asked
        _require(f"{name}_bufferSize", *asked, ctypes.byref(on_device), ctypes.byref(on_host), *last)
        device_work = cupy.empty(max(on_device.value, 1), np.uint8)
        host_work = np.empty(max(on_host.value, 1), np.uint8)
        room = _Address(device_work.data.ptr), on_device, _Address(host_work.ctypes.data), on_host
        _require(name, *asked, *room, _Address(info.data.ptr), *last)
        said: NDArray[np.int32] = info.get()  # which waits: nothing above is freed while it is used
        return said
    finally:
        cusolver.destroyParams(params)


def _require(name: str, *arguments: Any) -> None:
    try:
        routine = getattr(_library(), name)
    except AttributeError:
        raise RuntimeError(f"libcusolver is too old: it has no {name}") from None
    status = routine(*arguments)
    if status:
        raise RuntimeError(f"{name} failed: CUSOLVER_STATUS {status}")
