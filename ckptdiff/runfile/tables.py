"""Read and write the parts of a run file that come at its end: columns, facts, provenance, lists."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from operator import attrgetter
from typing import Any

import h5py
import numpy as np
from numpy.typing import DTypeLike

from ckptdiff.figures.catalogue import COLUMNS, flat_key
from ckptdiff.figures.result import SIDES, Diff, KeptFacts, PieceFacts, RowCounts, TensorFacts, UnmatchedTensor
from ckptdiff.measure.thresholds import RHO
from ckptdiff.runfile.schema import TEXT_FACTS, escape_text, unescape
from ckptdiff.runfile.typed import Spec, WrongTypeError, json_of, numbers_of, parse_json, require, texts_of

_SIDE: Spec = {"path": str, "shards": [{"file": str, "size": int, "mtime_ns": int, "header_sha256": str}]}
_ADDED: dict[str, Spec] = {
    "numel": int,
    "values": int,
    "uncompared": [str],
    "tied": int,
    "left_out": [{"pattern": str, "why": str, "tensors": int, "values": int}],
}
"""What each side may hold too; run files of 0.1.0 have only the first."""
_PROVENANCE: Spec = {
    "base": _SIDE,
    "tuned": _SIDE,
    "compare": str,
    "mask_rule": str,
    "options": {"renames": [str], "include": [str], "exclude": [str], "groups": [str]},
    "run": dict,
    "warnings": [str],
}
_UNMATCHED: Spec = {
    "only_in_base": [str],
    "only_in_tuned": [str],
    "aliased": [{"name": str, "of": str}],
    "mismatched": [{"name": str, "base": dict, "tuned": dict, "reason": str}],
}
"""What readers of these rely on."""
_PIECE: Spec = {"tuned_name": str, "base_index": [[int]], "tuned_index": [[int]], "transposed": bool}
_NEW_COLUMNS = ("off_grid", "on_grid", "unchanged_null", "stored_norm", "absorbed_norm")
"""Columns that run files of 0.1.0 lack."""
_NO_LAYER = -1
_TEXT = h5py.string_dtype()
_CHUNK = 1 << 14


def write_facts(group: Any, tensors: Sequence[TensorFacts]) -> None:
    """Begin ``/tensors`` with what needs no figure: the names, and one dataset per fact."""
    names = group.create_dataset("name", data=[escape_text(tensor.name) for tensor in tensors], dtype=_TEXT)
    names.attrs["long_name"] = "tensor name; % and NUL are percent-encoded"
    names.make_scale("name")
    for fact, long_name in TEXT_FACTS.items():
        texts = _packed(group, fact, _fixed_length(_facts_of(tensors, fact)))
        texts.attrs["_Encoding"] = "utf-8"  # so that xarray reads strings, not bytes
        describe(texts, names, None, long_name)
    layers = [_NO_LAYER if tensor.layer is None else tensor.layer for tensor in tensors]
    describe(_packed(group, "layer", np.array(layers, np.int64)), names, "1", "layer number, -1 for none")
    same = np.array(_facts_of(tensors, "same_bytes"), np.uint8)
    describe(_packed(group, "same_bytes", same), names, "1", "1 if both sides are the same bytes of the same file")
    unread = np.array(_facts_of(tensors, "unread"), np.uint8)
    describe(_packed(group, "unread", unread), names, "1", "1 if both sides are known to be the same and were not read")
    sizes = {shape: math.prod(shape) for shape in {tensor.shape for tensor in tensors}}
    for which, side in enumerate(SIDES):
        counts = [sizes[tensor.shape] if tensor.compared is None else tensor.compared[which] for tensor in tensors]
        compared = np.array(counts, np.int64)
        describe(_packed(group, f"compared_{side}", compared), names, "1", f"values of {side} that are compared")


def write_columns(group: Any, diff: Diff) -> None:
    """Fill ``/tensors``, which has the names, with one dataset per column.

    Raises ValueError if the columns are not those of the catalogue, one value per name.
    """
    missing = {column.name for column in COLUMNS} ^ set(diff.columns)
    if missing:
        raise ValueError(f"columns that are not those of the catalogue: {', '.join(sorted(missing))}")
    names = group["name"]
    for column in COLUMNS:
        values = np.asarray(diff.columns[column.name], column.dtype)
        if values.shape != names.shape:
            raise ValueError(f"column {column.name} has shape {values.shape} for {names.size} tensors")
        describe(_packed(group, column.name, values), names, column.units, column.long_name)


def write_provenance(file: Any, diff: Diff) -> None:
    """Write ``/provenance`` and ``/unmatched``."""
    # JSON with every character beyond ASCII escaped holds what HDF5 strings cannot: NUL, and paths that are not UTF-8.
    file["provenance"] = json.dumps(
        {
            "base": diff.base,
            "tuned": diff.tuned,
            "compare": diff.compare,
            "mask_rule": diff.mask_rule,
            "options": diff.options,
            "run": diff.run,
            "warnings": diff.warnings,
        },
        allow_nan=False,
    )
    laid_out = {tensor.name: _laid_out(tensor) for tensor in diff.tensors if not tensor.plain}
    if laid_out:
        file["layouts"] = json.dumps(laid_out)
    file["unmatched"] = json.dumps(
        {
            "only_in_base": diff.only_in_base,
            "only_in_tuned": diff.only_in_tuned,
            "aliased": [{"name": name, "of": of} for name, of in diff.aliased],
            "mismatched": [
                {"name": tensor.name, "base": tensor.base, "tuned": tensor.tuned, "reason": tensor.reason}
                for tensor in diff.mismatched
            ],
            "suggested_map": diff.suggested_map,
        },
        allow_nan=False,
    )


def _laid_out(tensor: TensorFacts) -> dict[str, Any]:
    """What a tensor is compared with, if not with a whole one of its own layout."""
    found: dict[str, Any] = {}
    if tensor.pieces:
        found["pieces"] = [asdict(piece) for piece in tensor.pieces]
    if tensor.rows is not None:
        found["rows"] = tensor.rows._asdict()
    if tensor.untied:
        found["untied"] = True
    if tensor.kept is not None:
        found["kept"] = tensor.kept._asdict()
    return found


def read_layouts(file: Any) -> dict[str, dict[str, Any]]:
    """The fields of :class:`~ckptdiff.figures.result.TensorFacts` of tensors in other layouts, by their names."""
    if "layouts" not in file:
        return {}
    fields = {}
    for name, found in json_of(file["layouts"], dict).items():
        where = f"{file['layouts'].name}: {name}"
        require(found, dict, where)
        pieces, rows = found.get("pieces", []), found.get("rows")
        require(pieces, [_PIECE], f"{where}: pieces")
        if rows is not None:
            require(rows, dict.fromkeys(RowCounts._fields, int), f"{where}: rows")
        fields[name] = {
            "pieces": tuple(
                PieceFacts(
                    piece["tuned_name"],
                    tuple(map(tuple, piece["base_index"])),
                    tuple(map(tuple, piece["tuned_index"])),
                    piece["transposed"],
                )
                for piece in pieces
            ),
            "rows": None if rows is None else RowCounts(**rows),
            "untied": found.get("untied") is True,
            "kept": _kept(found.get("kept"), f"{where}: kept"),
        }
    return fields


def _kept(found: Any, where: str) -> KeptFacts | None:
    if found is None:
        return None
    require(found, dict, where)
    shares = [found.get(key) for key in KeptFacts._fields]
    for share in shares:
        if share is not None and type(share) not in (int, float):
            raise WrongTypeError(f"shares in {where}", share)
    return KeptFacts(*shares)


def numbers_of_tensors(group: Any, name: str, dtype: DTypeLike) -> Any:
    """A dataset of ``/tensors`` that holds a number per tensor; raises WrongTypeError if it does not."""
    return numbers_of(_of_tensors(group, name), dtype)


def texts_of_tensors(group: Any, name: str) -> list[str]:
    """A dataset of ``/tensors`` that holds a text per tensor, unescaped; raises WrongTypeError if it does not."""
    return list(map(unescape, texts_of(_of_tensors(group, name))))


def _of_tensors(group: Any, name: str) -> Any:
    dataset, names = group[name], group["name"]
    for found in (names, dataset):
        if not isinstance(found, h5py.Dataset):
            raise WrongTypeError(f"one value per tensor in {found.name}", "a group")
        if found.shape != (names.size,):
            raise WrongTypeError(f"one value per tensor in {found.name}", f"shape {found.shape}, {names.size} tensors")
    return dataset


def read_columns(group: Any) -> dict[str, Any]:
    """Every column of the catalogue, by name.

    Run files of 0.1.0 lack some. They have a rounding null where the base lies on the grid alone, and so tell where it
    does; elsewhere all of it counts as off it.
    """
    columns = {
        column.name: numbers_of_tensors(group, column.name, column.dtype)
        for column in COLUMNS
        if column.name not in _NEW_COLUMNS or column.name in group
    }
    if "off_grid" not in columns:
        known = ~np.isnan(columns[flat_key("low_coverage_null", RHO[0])])
        columns["off_grid"] = np.where(known, 0, columns["numel"]).astype(np.uint64)
        columns["on_grid"] = known.astype(np.uint64)
    unknown = np.full(len(columns["numel"]), np.nan)
    return {**{name: unknown for name in _NEW_COLUMNS if name not in columns}, **columns}


def read_facts(group: Any) -> tuple[TensorFacts, ...]:
    """Facts of each tensor, in plan order."""
    texts = {fact: texts_of_tensors(group, fact) for fact in ("name", *TEXT_FACTS)}
    layers = numbers_of_tensors(group, "layer", np.int64).tolist()
    same = numbers_of_tensors(group, "same_bytes", np.uint8).tolist()
    # Run files of older versions have none.
    unread = numbers_of_tensors(group, "unread", np.uint8).tolist() if "unread" in group else [0] * len(same)
    facts = [
        _facts({fact: values[row] for fact, values in texts.items()}, layers[row], same[row] == 1, unread[row] == 1)
        for row in range(len(layers))
    ]
    if "compared_base" not in group:  # a run file of 0.1.0, which compared tensors of equal shape alone
        return tuple(facts)
    sides = [numbers_of_tensors(group, f"compared_{side}", np.int64).tolist() for side in SIDES]
    return tuple(
        one if set(compared) == {math.prod(one.shape)} else replace(one, compared=compared)
        for one, compared in zip(facts, zip(*sides, strict=True), strict=True)
    )


def read_provenance(file: Any) -> dict[str, Any]:
    """The JSON object of ``/provenance``."""
    known: dict[str, Any] = json_of(file["provenance"], _PROVENANCE)
    for side in ("base", "tuned"):
        for key, spec in _ADDED.items():
            if key in known[side]:
                require(known[side][key], spec, f"{file['provenance'].name}: {side}: {key}")
    return known


def read_unmatched(file: Any) -> dict[str, Any]:
    """The lists of ``/unmatched``, as fields of a :class:`~ckptdiff.figures.result.Diff`."""
    lists = json_of(file["unmatched"], _UNMATCHED)
    suggested = lists.get("suggested_map", [])  # older run files have none
    require(suggested, [str], f"{file['unmatched'].name}: suggested_map")
    return {
        "only_in_base": tuple(lists["only_in_base"]),
        "only_in_tuned": tuple(lists["only_in_tuned"]),
        "aliased": tuple((alias["name"], alias["of"]) for alias in lists["aliased"]),
        "mismatched": tuple(UnmatchedTensor(**tensor) for tensor in lists["mismatched"]),
        "suggested_map": tuple(suggested),
    }


def _facts(texts: Mapping[str, str], layer: int, same_bytes: bool, unread: bool) -> TensorFacts:
    return TensorFacts(
        name=texts["name"],
        dtype_base=texts["dtype_base"],
        dtype_tuned=texts["dtype_tuned"],
        compare=texts["compare"],
        tower=texts["tower"],
        shape=_parsed(texts["shape"], int, "/tensors/shape"),
        layer=None if layer == _NO_LAYER else layer,
        module_type=texts["module_type"],
        block=texts["block"],
        tuned_name=None if texts["tuned_name"] == texts["name"] else texts["tuned_name"],
        groups=_parsed(texts["groups"], str, "/tensors/groups"),
        same_bytes=same_bytes,
        unread=unread,
    )


@lru_cache(1024)
def _parsed(text: str, of: type, where: str) -> tuple[Any, ...]:
    """A list in JSON; thousands of tensors have few shapes and groups between them."""
    return tuple(parse_json(text, [of], where))


def _facts_of(tensors: Sequence[TensorFacts], fact: str) -> list[Hashable]:
    """One fact of every tensor."""
    if fact == "tuned_name":
        return [tensor.name if tensor.tuned_name is None else tensor.tuned_name for tensor in tensors]
    return list(map(attrgetter(fact), tensors))


def _fixed_length(values: Sequence[Hashable]) -> Any:
    """Strings, or what becomes JSON, as an array of texts.

    HDF5 takes far longer over texts of variable length, and cannot compress them.
    """
    if not values:
        return np.empty(0, _TEXT)
    # Thousands of tensors have few shapes, dtypes and types between them.
    place = {value: at for at, value in enumerate(dict.fromkeys(values))}
    texts = [escape_text(value if isinstance(value, str) else json.dumps(value)).encode() for value in place]
    table = np.array(texts, h5py.string_dtype("utf-8", max(1, *map(len, texts))))
    return table[np.fromiter(map(place.__getitem__, values), np.intp, len(values))]


def _packed(group: Any, name: str, values: Any) -> Any:
    # To deflate a float column takes as long as all the counts, and saves a tenth of it.
    if not values.size or values.dtype.kind == "f":
        return group.create_dataset(name, data=values)
    return group.create_dataset(
        name, data=values, chunks=(min(values.size, _CHUNK),), compression="gzip", compression_opts=1
    )


def describe(dataset: Any, names: Any, units: str | None, long_name: str) -> None:
    """Say of a dataset of ``/tensors`` what it holds, in which units if it is numbers, and of which names."""
    dataset.attrs["long_name"] = long_name
    if units is not None:
        dataset.attrs["units"] = units
    dataset.dims[0].attach_scale(names)
