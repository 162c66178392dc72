"""Compare run files: everything in them but what says when they were made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np


def contents(path: Path) -> dict[str, Any]:
    """Everything in a run file, but what says when it ran."""
    found: dict[str, Any] = {}
    with h5py.File(path) as file:
        found["attributes"] = dict(file.attrs)

        def take(name: str, item: Any) -> None:
            attributes = {key: repr(value) for key, value in item.attrs.items() if "REFERENCE" not in repr(value)}
            values = item[()] if isinstance(item, h5py.Dataset) else None
            if name == "provenance":
                said = json.loads(values)
                found[name] = said | {"run": {k: v for k, v in said["run"].items() if k not in ("started", "seconds")}}
            elif isinstance(values, np.ndarray):
                held = values.tolist() if values.dtype == object else values.tobytes()
                found[name] = (values.dtype, values.shape, held, attributes)
            else:
                found[name] = (values, attributes)

        file.visititems(take)
    return found
