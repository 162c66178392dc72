"""Read a shard's header, and check it in full before any tensor data is touched.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, then the tensors' bytes
without a gap. What the safetensors library refuses is refused here too, and beyond it: keys given twice, white space
before the header, tensors described by lists, and sizes that no array can have.
"""

from __future__ import annotations

import hashlib
import math
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, TypeAlias, TypeGuard

from ckptdiff.checkpoint.dtypes import DTYPES
from ckptdiff.checkpoint.foreign import foreign_format
from ckptdiff.checkpoint.regular_file import open_regular, read_bytes
from ckptdiff.checkpoint.strict_json import JsonProblemError, parse_object
from ckptdiff.checkpoint.tensor_info import ELSEWHERE, Shard, Slice, TensorInfo
from ckptdiff.errors import HeaderError
from ckptdiff.remote.address import Address
from ckptdiff.remote.remote_file import RemoteFile

__all__ = ["MAX_HEADER_BYTES", "Shard", "Slice", "TensorInfo", "read_header"]

MAX_HEADER_BYTES = 100_000_000
"""The longest header that the safetensors library reads."""

_LENGTH_BYTES = 8
_FIRST_BYTES = 1 << 19
"""Of a remote file, fetched at first: with most headers, and the length before them."""
_SIZE_LIMIT = 2**63
_BITS_LIMIT = 8 * _SIZE_LIMIT
_MAX_DIMENSIONS = 64
_INTEGER = {int}
_ENTRY = itemgetter("dtype", "shape", "data_offsets")
_REPR = reprlib.Repr()
_REPR.maxlist = _REPR.maxstring = 80
_NOTHING: Mapping[str, Sequence[TensorInfo]] = {}

_Sizes: TypeAlias = dict[tuple[str, tuple[int, ...]], int]
"""Bytes of a tensor by dtype and shape, of those that were checked: thousands of tensors have few between them."""


def read_header(
    path: str | os.PathLike[str],
    address: Address | None = None,
    content: str = "",
    known: Mapping[str, Sequence[TensorInfo]] = _NOTHING,
) -> tuple[Shard, tuple[TensorInfo, ...]]:
    """Read and validate the header of one safetensors file.

    Parameters
    ----------
    path : path-like
        A regular file, or a symbolic link to one; or what is shown of the address.
    address : Address, optional
        Where it is, if it is no local file.
    content : str
        The hash of its bytes, if that is known.
    known : mapping of str to sequence of TensorInfo
        All tensors of other files, in the order of their bytes, by the SHA-256 of their header.

    Returns
    -------
    Shard
        The file.
    tuple of TensorInfo
        Its tensors in the order of their bytes; empty tensors at one offset by name.

    Raises
    ------
    HeaderError
        A file that breaks the safetensors format.
    CheckpointError
        A file that cannot be read, or is no regular file.
    """
    file = os.fspath(path)
    remote = None
    if address is None:
        with open_regular(file) as (descriptor, status):
            start = read_bytes(descriptor, min(status.st_size, 64), 0, file)
            length = _header_length(start, status.st_size, file)
            raw = read_bytes(descriptor, length, _LENGTH_BYTES, file)
        place = status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino
    else:
        from ckptdiff.remote.transport import fetch, fetch_start

        start, version = fetch_start(address, _FIRST_BYTES)
        length = _header_length(start, version.size, file)
        raw = start[_LENGTH_BYTES : _LENGTH_BYTES + length]
        if len(raw) < length:
            rest = bytearray(length - len(raw))
            fetch(address, len(start), memoryview(rest), version)
            raw += rest
        remote = RemoteFile(address, version, content)
        place = version.size, _nanoseconds(version.modified), ELSEWHERE, remote.identity
    digest = hashlib.sha256(start[:_LENGTH_BYTES] + raw).hexdigest()
    data_start = _LENGTH_BYTES + length
    if digest in known:
        # Most fine-tuned models are saved as their base was: what the same header says is known.
        shard = Shard(file, *place, digest, known[digest][0].shard.metadata, remote, content)
        tensors = [TensorInfo(one.name, one.dtype, one.shape, shard, one.start, one.stop) for one in known[digest]]
    else:
        header = _parse(raw, file)
        shard = Shard(file, *place, digest, _metadata(header.pop("__metadata__", None), file), remote, content)
        sizes: _Sizes = {}
        tensors = _plain_tensors(header, shard, data_start) or [
            _tensor(name, entry, shard, data_start, sizes) for name, entry in header.items()
        ]
        tensors.sort(key=attrgetter("start", "stop", "name"))
    _check_coverage(tensors, shard, data_start)
    return shard, tuple(tensors)


def _nanoseconds(modified: str) -> int:
    """A date as HTTP writes it, in nanoseconds since the epoch; 0 if it is none."""
    from email.utils import parsedate_to_datetime

    try:
        return int(parsedate_to_datetime(modified).replace(tzinfo=UTC).timestamp()) * 10**9
    except (ValueError, TypeError, OverflowError):
        return 0


def _header_length(start: bytes, size: int, file: str) -> int:
    if size < _LENGTH_BYTES:
        raise HeaderError(
            "the file is empty" if size == 0 else "the file is too short for a safetensors file",
            file=file,
            expected="at least 8 bytes",
            found=f"{size} bytes",
            hint="the download or copy may be incomplete: fetch it again",
        )
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if length <= min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
        return length
    foreign = foreign_format(start) if length > MAX_HEADER_BYTES else None
    if foreign is not None:
        raise HeaderError(
            "not a safetensors file", file=file, expected="safetensors", found=foreign[0], hint=foreign[1]
        )
    if length > MAX_HEADER_BYTES:
        raise HeaderError(
            "the header length is over the limit of the format",
            file=file,
            expected=f"at most {MAX_HEADER_BYTES} bytes",
            found=f"{length} bytes",
            hint="check that this is a safetensors file and that it was copied whole",
        )
    raise HeaderError(
        "the header does not end inside the file",
        file=file,
        expected=f"at most {size - _LENGTH_BYTES} bytes",
        found=f"a header length of {length} bytes",
        hint="the file is truncated or no safetensors file: fetch it again",
    )


def _parse(raw: bytes, file: str) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise HeaderError(
            "the header does not begin with '{'",
            file=file,
            expected="b'{'",
            found=repr(raw[:8]) if raw else "an empty header",
        )
    try:
        return parse_object(raw)
    except JsonProblemError as error:
        raise HeaderError(
            f"the header {error.problem}", file=file, expected=error.expected, found=error.found
        ) from error


def _metadata(value: object, file: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise HeaderError("__metadata__ is not a map of strings", file=file, expected="strings", found=_brief(value))
    return value


def _plain_tensors(header: Mapping[str, Any], shard: Shard, data_start: int) -> list[TensorInfo] | None:
    """All tensors, checked together; None if anything may be wrong with one, so that each has to be looked at."""
    try:
        dtypes, shapes, offsets = zip(*map(_ENTRY, header.values()), strict=True)
        lists = [*shapes, *offsets]
        if {*map(type, lists)} != {list} or {*map(type, chain.from_iterable(lists))} != _INTEGER:
            return None
        kinds = list(zip(dtypes, map(tuple, shapes), strict=True))
        sizes = {kind: _size(*kind, _refuse_one) for kind in {*kinds}}
        for kind, (start, stop) in zip(kinds, offsets, strict=True):
            if not 0 <= start <= stop < _SIZE_LIMIT or stop - start != sizes[kind]:
                return None
    except (HeaderError, KeyError, TypeError, ValueError):
        return None
    return [
        TensorInfo(name, *kind, shard, data_start + start, data_start + stop)
        for name, kind, (start, stop) in zip(header, kinds, offsets, strict=True)
    ]


def _refuse_one(problem: str, expected: str, found: str) -> HeaderError:
    return HeaderError(problem, expected=expected, found=found)


def _tensor(name: str, entry: object, shard: Shard, data_start: int, sizes: _Sizes) -> TensorInfo:
    def refuse(problem: str, expected: str, found: str) -> HeaderError:
        return HeaderError(problem, file=shard.path, tensor=name, expected=expected, found=found)

    if not isinstance(entry, dict):
        raise refuse("the header does not describe the tensor by an object", "{...}", _brief(entry))
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except KeyError as missing:
        key = missing.args[0]
        raise refuse(f"the header gives the tensor no {key}", f"{key!r} among the keys", _brief(list(entry))) from None
    if dtype == "" and shape == []:
        raise HeaderError(
            "the header names the tensor without dtype, shape and values: it was written for a tied head",
            file=shard.path,
            tensor=name,
            expected="a dtype",
            found="an empty one, as torch's consolidate_safetensors_files writes for names that no file stores",
            hint="consolidate again without this name in fqn_to_index_mapping: its values are the embedding's",
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse("unknown dtype", "one of " + " ".join(DTYPES), _brief(dtype))
    if not _are_integers(shape):
        raise refuse("the shape is not a list of sizes", "integers from 0 to 2^63 - 1", _brief(shape))
    what = dtype, tuple(shape)
    size = sizes.get(what)
    if size is None:
        size = sizes[what] = _size(*what, refuse)
    start, stop = offsets if _are_integers(offsets) and len(offsets) == 2 else (-1, -1)
    if not (0 <= start < _SIZE_LIMIT and 0 <= stop < _SIZE_LIMIT):
        raise refuse("data_offsets is not a pair of offsets", "two integers from 0 to 2^63 - 1", _brief(offsets))
    if stop < start:
        raise refuse("data_offsets are reversed", "start <= stop", _brief(offsets))
    if stop - start != size:
        raise refuse(
            "the size disagrees with shape and dtype",
            f"{size} bytes for {dtype} {_brief(shape)}",
            f"{stop - start} bytes",
        )
    return TensorInfo(name, *what, shard, data_start + start, data_start + stop)


def _are_integers(value: object) -> TypeGuard[list[int]]:
    # The type itself: True is an int to isinstance, and no size.
    return isinstance(value, list) and {*map(type, value)} <= _INTEGER


def _size(dtype: str, shape: tuple[int, ...], refuse: Callable[[str, str, str], HeaderError]) -> int:
    """Bytes of a tensor; raises what is wrong with its shape."""
    sizes = list(shape)
    if min(sizes, default=0) < 0 or max(sizes, default=0) >= _SIZE_LIMIT:
        raise refuse("the shape is not a list of sizes", "integers from 0 to 2^63 - 1", _brief(sizes))
    if len(sizes) > _MAX_DIMENSIONS:
        raise refuse("too many dimensions", f"at most {_MAX_DIMENSIONS}", f"{len(sizes)}")
    total_bits = DTYPES[dtype].bits * math.prod(sizes)
    # An empty tensor's other sizes are bounded too: NumPy and HDF5 refuse shapes whose product overflows.
    if (total_bits or math.prod(size for size in sizes if size) * DTYPES[dtype].bits) >= _BITS_LIMIT:
        raise refuse("the shape is larger than any array", "less than 2^63 bytes", _brief(sizes))
    if total_bits % 8:
        raise refuse("the elements do not fill whole bytes", "a multiple of 8 bits", f"{total_bits} bits")
    return total_bits // 8


def _check_coverage(tensors: list[TensorInfo], shard: Shard, data_start: int) -> None:
    end, previous = data_start, "the header"
    for tensor in tensors:
        if tensor.start != end:
            overlap = tensor.start < end
            raise HeaderError(
                "two tensors overlap" if overlap else "there are bytes between tensors that belong to none",
                file=shard.path,
                tensor=tensor.name,
                expected=f"data_offsets that start at {end - data_start}, where {previous} ends",
                found=f"data_offsets that start at {tensor.start - data_start}",
            )
        end, previous = tensor.stop, f"tensor {tensor.name}"
    if end > shard.size:
        cut = next(tensor for tensor in tensors if tensor.stop > shard.size)
        raise HeaderError(
            "the file is truncated: tensors lie beyond its end",
            file=shard.path,
            tensor=cut.name,
            expected=f"{end} bytes",
            found=f"{shard.size} bytes",
            hint="the download or copy is incomplete: fetch it again",
        )
    if end < shard.size:
        raise HeaderError(
            "there are bytes after the last tensor",
            file=shard.path,
            expected=f"{end} bytes",
            found=f"{shard.size} bytes",
        )


def _brief(value: object) -> str:
    # reprlib bounds depth too: plain repr of what a hostile header holds can itself run out of stack.
    return _REPR.repr(value)
