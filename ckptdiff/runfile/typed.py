"""Read what a file holds as the type that it should be of: other programs may have written or damaged it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import h5py
import numpy as np
from numpy.typing import DTypeLike

Spec: TypeAlias = type | list["Spec"] | Mapping[str, "Spec"]
"""What a JSON value has to be: a type, a list of such values, or an object with at least these keys."""

_SPOKEN = {dict: "an object", list: "a list", str: "text", int: "a whole number", bool: "true or false"}
_LONGEST = 80


class WrongTypeError(ValueError):
    """Something of another type than it should be: `expected` says what should be there, and where."""

    def __init__(self, expected: str, found: object) -> None:
        text = found if isinstance(found, str) else repr(found)
        self.expected = expected
        self.found = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
        super().__init__(f"expected {expected}, found {self.found}")


def text_of(owner: Any, name: str) -> str:
    """Text attribute of a file, group or dataset.

    Raises KeyError if there is none, and WrongTypeError if it is not text, or not UTF-8.
    """
    value = owner.attrs[name]
    # h5py keeps bytes that are not UTF-8 as lone surrogates, and gives bytes for texts of fixed length.
    raw = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    try:
        return str(raw.decode())
    except (AttributeError, UnicodeDecodeError):
        raise WrongTypeError(f"UTF-8 text in the attribute {name} of {owner.name}", raw) from None


def shape_of(owner: Any) -> tuple[int, ...]:
    """The attribute ``shape`` of a dataset, whole numbers; raises KeyError and WrongTypeError as :func:`text_of`."""
    axes = owner.attrs["shape"]
    if not isinstance(axes, np.ndarray) or axes.ndim != 1 or axes.dtype.kind not in "iu":
        raise WrongTypeError(f"a list of whole numbers in the attribute shape of {owner.name}", axes)
    return tuple(axes.tolist())


def texts_of(dataset: Any) -> list[str]:
    """Every text of a dataset; raises WrongTypeError if it holds none, or not UTF-8."""
    expected = f"UTF-8 text in {dataset.name}"
    if h5py.check_string_dtype(_dtype(dataset, expected)) is None:
        raise WrongTypeError(expected, str(dataset.dtype))
    try:
        # Nothing can be read from an empty dataset as text.
        return dataset.asstr()[:].tolist() if dataset.size else []
    except UnicodeDecodeError as error:
        raise WrongTypeError(expected, error.object) from None


def numbers_of(dataset: Any, dtype: DTypeLike) -> Any:
    """Every number of a dataset, shape as stored; raises WrongTypeError if `dtype` cannot hold them."""
    expected = f"{np.dtype(dtype)} in {dataset.name}"
    if not np.can_cast(_dtype(dataset, expected), dtype):
        raise WrongTypeError(expected, str(dataset.dtype))
    return dataset[:].astype(dtype, copy=False)


def json_of(dataset: Any, spec: Spec) -> Any:
    """The JSON value that a dataset of one text holds; raises WrongTypeError if it is not as `spec` says."""
    expected = f"JSON text in {dataset.name}"
    if h5py.check_string_dtype(_dtype(dataset, expected)) is None or dataset.shape != ():
        raise WrongTypeError(expected, f"{dataset.dtype} of shape {dataset.shape}")
    return parse_json(dataset[()], spec, dataset.name)


def parse_json(text: str | bytes, spec: Spec, where: str) -> Any:
    """Read JSON text; raises WrongTypeError if it is not as `spec` says."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise WrongTypeError(f"JSON text in {where}", text) from None
    require(value, spec, where)
    return value


def require(value: Any, spec: Spec, where: str) -> None:
    """Raise WrongTypeError if a JSON value is not as `spec` says."""
    kind = spec if isinstance(spec, type) else list if isinstance(spec, list) else dict
    found: type = type(value)
    if found is not kind:  # not isinstance: True is no whole number
        raise WrongTypeError(f"{_SPOKEN[kind]} in {where}", value)
    if isinstance(spec, list):
        for item in value:
            require(item, spec[0], where)
    elif isinstance(spec, Mapping):
        for key, inner in spec.items():
            if key not in value:
                raise WrongTypeError(f"the key {key} in {where}", ", ".join(value) or "no key")
            require(value[key], inner, f"{where}: {key}")


def _dtype(dataset: Any, expected: str) -> Any:
    if not isinstance(dataset, h5py.Dataset):
        raise WrongTypeError(expected, "a group")
    return dataset.dtype
