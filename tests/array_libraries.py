"""Libraries of arrays that the stages are run on: NumPy, and two that stand in for that of a GPU.

``array-api-strict`` has what the standard demands and no more. Its arrays lie on a device of theirs here, which meets
no array of another one, and from which only `AnyLibrary.home` fetches anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

import array_api_compat.torch
import array_api_strict
import numpy as np
import pytest

from ckptdiff.linalg.library import Library
from ckptdiff.linalg.on_any import AnyLibrary
from ckptdiff.linalg.on_numpy import NUMPY
from ckptdiff.linalg.stages import ArrayPanels

Made: TypeAlias = Callable[..., ArrayPanels]
"""Makes a pair in memory of NumPy's arrays and a number of rows, as `ArrayPanels` does."""

NAMES = ("numpy", "strict", "torch")
HOST_ROWS = 48
"""Larger eigenproblems go to the library, small as the matrices of tests are."""


def library_called(name: str) -> Library:
    if name == "numpy":
        return NUMPY
    if name == "torch":
        return AnyLibrary(array_api_compat.torch, "cpu", HOST_ROWS)
    return AnyLibrary(array_api_strict, array_api_strict.Device("device1"), HOST_ROWS)


def panels_of(library: Library) -> Made:
    def made(base: Any, delta: Any, rows: int = 512) -> ArrayPanels:
        sides = (library.put(side) if isinstance(side, np.ndarray) else side for side in (base, delta))
        return ArrayPanels(*sides, rows, library)

    return made


def refuse_silent_transfers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let strict arrays become numbers and NumPy's arrays in no way but `home`; the list takes the size of each."""

    def refused(self: Any, *args: Any, **options: Any) -> NoReturn:
        raise AssertionError("a transfer to the host that nobody asked for")

    for name in ("__array__", "__bool__", "__buffer__", "__complex__", "__float__", "__index__", "__int__"):
        monkeypatch.setattr(array_api_strict._array_object.Array, name, refused)
    fetched: list[int] = []
    given = array_api_strict._array_object.Array.__dlpack__

    def noted(self: Any, **options: Any) -> Any:
        fetched.append(self.size)
        return given(self, **options)

    monkeypatch.setattr(array_api_strict._array_object.Array, "__dlpack__", noted)
    return fetched
