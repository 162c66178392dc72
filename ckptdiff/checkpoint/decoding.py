"""Decode boxes of quantised weights to float32: only its own bytes are read, and memory is proportional to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptdiff.checkpoint.code_formats import CODES
from ckptdiff.checkpoint.dtypes import DTYPES
from ckptdiff.checkpoint.gather import read_bytes_of
from ckptdiff.checkpoint.header import TensorInfo
from ckptdiff.checkpoint.kernels.code_values import decode_codes
from ckptdiff.checkpoint.open_shards import OpenShards
from ckptdiff.checkpoint.weights import Decoded
from ckptdiff.formats import FORMATS
from ckptdiff.measure.code_box import CodeBox
from ckptdiff.measure.source import ByteArray

__all__ = ["Box", "BoxScales", "Decoder", "DecodingRoom", "Floats", "OddScales", "decode_box", "flip_of"]

Floats: TypeAlias = NDArray[np.float32]

OddScales: TypeAlias = Counter[tuple[str, str]]
"""How many scales are no positive numbers, by the name of the tensor that holds them, and what they are."""

_WORD = 32
_PADDING = 4
"""Bytes of a word: rows of packed integers end with one."""
_NO_FLOATS = np.empty(0, np.float32)
_NO_MATRIX, _NO_CODES = np.empty((0, 0), np.float32), np.empty((0, 0), np.uint8)
_POWERS = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.nan).astype(np.float32)
_BYTES = {
    "F8_E4M3": FORMATS["f8_e4m3"].values(),
    "F8_E5M2": FORMATS["f8_e5m2"].values(),
    "F8_E8M0": _POWERS,
    "U8": _POWERS,
}
"""Value of each scale of eight bits, by its dtype."""


class DecodingRoom:
    """Memory that one box after another is decoded in; of one thread, and one of the two sides that are compared."""

    def __init__(self) -> None:
        self._held: dict[str, NDArray[np.uint8]] = {}

    def take(self, what: str, size: int) -> NDArray[np.uint8]:
        """Bytes for one purpose, not cleared, valid until they are next asked for."""
        held = self._held.get(what)
        if held is None or held.size < size:
            held = self._held[what] = np.empty(size, np.uint8)
        return held[:size]


@dataclass(frozen=True, slots=True)
class BoxScales:
    """The scales of a box of a weight's matrix.

    Attributes
    ----------
    weight : Decoded
    odd : Counter
        Scales that are zero, negative, NaN or infinite. Each is counted in the box that has its first value, so that
        the counts of boxes that fill a matrix add up to those of the tensor.
    scales : float32 array, shape (k, l)
        Of the blocks whose first value is in the box, with the global scale.
    starts : tuple of (int64 array, int64 array)
        Where those begin in the box: rows, shape (k,), and columns, shape (l,).
    """

    weight: Decoded
    odd: OddScales
    scales: Floats
    starts: tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Box(BoxScales):
    """A box of a weight's matrix, decoded.

    Attributes
    ----------
    values : float32 array, shape (rows, columns)
    steps : float32 array, shape (rows, columns), or None
        With `detail`: from each code to the next one of larger magnitude, as a value. In the room that it was given.
    fields : uint8 array, shape (rows, columns), or None
        With `detail`: the codes, one to a byte. In the room that it was given.
    """

    values: Floats
    steps: Floats | None
    fields: NDArray[np.uint8] | None


def decode_box(
    shards: OpenShards,
    weight: Decoded,
    rows: tuple[int, int],
    columns: tuple[int, int],
    out: Floats,
    room: DecodingRoom,
    *,
    detail: bool = False,
) -> Box:
    """Decode rows and columns of a weight's matrix.

    Parameters
    ----------
    shards : OpenShards
        The readers of its files.
    weight : Decoded
    rows, columns : tuple of (int, int)
        From the first on up to the second, which is left out; at least one of each. They need not fit blocks.
    out : float32 array, shape (rows, columns), C-contiguous
        Receives the values.
    room : DecodingRoom
    detail : bool
        Whether steps and fields are wanted too, which :func:`count_kept` needs.

    Returns
    -------
    Box

    Raises
    ------
    CheckpointError
        If a file cannot be read, or changes.
    """
    code, shape = CODES[weight.code], out.shape
    steps = room.take("steps", 4 * out.size).view(np.float32).reshape(shape) if detail else _NO_MATRIX
    fields = room.take("fields", out.size).reshape(shape) if detail else _NO_CODES
    with _opened(shards, weight, rows, columns, room) as (box, own):
        places = box.scales, box.zeros, box.lines, box.width, box.before
        how = box.stride, box.skip, code, flip_of(weight)
        decode_codes(box.raw, *how, places, box.factors, weight.divides, out, fields, steps)
    found = steps if detail else None, fields if detail else None
    return Box(own.weight, own.odd, own.scales, own.starts, out, *found)


def flip_of(weight: Decoded) -> int:
    """Bits of each code to turn over, which makes fields of signed bytes."""
    return 0x80 if weight.codes.dtype == "I8" and not CODES[weight.code].floats else 0


@contextmanager
def _opened(
    shards: OpenShards,
    weight: Decoded,
    rows: tuple[int, int],
    columns: tuple[int, int],
    room: DecodingRoom,
    raw_room: ByteArray | None = None,
) -> Iterator[tuple[CodeBox, BoxScales]]:
    """Codes and scales of a box, the former in a room of their own if there is one; valid within this."""
    (top, bottom), (left, right) = rows, columns
    height, width = weight.block
    code = CODES[weight.code]
    flat = np.arange(top, bottom)
    upwards = -(-weight.period // height)
    lines = flat // weight.period * upwards + flat % weight.period // height
    grid = _Cut(int(lines[0]), int(lines[-1]) + 1, left // width, (right - 1) // width + 1)
    scales = _scales(shards, weight.scales, -(-weight.shape[-1] // width), grid, room)
    zeros = _NO_MATRIX if code.floats else _zeros(shards, weight, code.bits, upwards, grid, room)
    factors = _factors(shards, weight, flat, room)
    down, right_of = np.flatnonzero(flat % weight.period % height == 0), np.arange(-left % width, right - left, width)
    own = scales[len(scales) - len(down) :, scales.shape[1] - len(right_of) :]
    odd = _odd(weight.scales, own)
    if weight.global_scale is not None:
        if left == 0:
            first = np.flatnonzero(flat % (weight.rows // weight.global_scale.numel) == 0)
            odd += _odd(weight.global_scale, factors[first])
        with np.errstate(all="ignore"):
            own = own / factors[down, None] if weight.divides else own * factors[down, None]
    cut = _Cut(top, bottom, left * code.bits // 8, -(-right * code.bits // 8))
    with ExitStack() as stack:
        raw, stride = _bytes(shards, weight.codes, weight.codes.nbytes // weight.rows, cut, room, stack, raw_room)
        skip, before = left * code.bits % 8, left % width
        box = CodeBox(raw, stride, skip, scales, zeros, lines - lines[0], width, before, factors, right - left)
        yield box, BoxScales(weight, odd, own, (down, right_of))


class Decoder:
    """Decodes quantised weights, of one side in one thread.

    Attributes
    ----------
    odd : set of (str, str, str, str)
        Scales that are no positive numbers: file, tensor, what some of them are, and the weight that they are of.
    """

    def __init__(self) -> None:
        self._room = DecodingRoom()
        self.odd: set[tuple[str, str, str, str]] = set()

    def decode(
        self,
        shards: OpenShards,
        weight: Decoded,
        rows: tuple[int, int],
        columns: tuple[int, int],
        out: Floats,
        *,
        detail: bool = False,
    ) -> Box:
        """Decode a box; see :func:`decode_box`. It is valid until the next one."""
        box = decode_box(shards, weight, rows, columns, out, self._room, detail=detail)
        self._note(box)
        return box

    @contextmanager
    def opened(
        self,
        shards: OpenShards,
        weight: Decoded,
        rows: tuple[int, int],
        columns: tuple[int, int],
        raw_room: ByteArray,
    ) -> Iterator[tuple[CodeBox, BoxScales]]:
        """Codes, in ``raw_room`` or mapped, and scales of a box, for who decodes them; valid within this."""
        with _opened(shards, weight, rows, columns, self._room, raw_room) as (box, scales):
            self._note(scales)
            yield box, scales

    def _note(self, box: BoxScales) -> None:
        paths = {part.name: part.shard.path for part in box.weight.parts} if box.odd else {}
        self.odd |= {(paths[name], name, what, box.weight.name) for name, what in box.odd}


def _odd(part: TensorInfo, scales: Floats) -> OddScales:
    found: OddScales = Counter()
    if not ((scales > 0) & (scales < np.inf)).all():
        kinds = {
            "zero": scales == 0,
            "negative": scales < 0,
            "NaN": np.isnan(scales),
            "infinite": scales == np.inf,
        }
        found.update({(part.name, what): int(np.count_nonzero(which)) for what, which in kinds.items() if which.any()})
    return found


class _Cut(NamedTuple):
    """Rows and columns of a matrix, from the first up to what follows the last."""

    top: int
    bottom: int
    left: int
    right: int


def _factors(shards: OpenShards, weight: Decoded, flat: NDArray[np.int64], room: DecodingRoom) -> Floats:
    """The global scale of each row; none, if there is none."""
    part = weight.global_scale
    if part is None:
        return _NO_FLOATS
    matrices = flat // (weight.rows // part.numel)
    first = int(matrices[0])
    held = _scales(shards, part, 1, _Cut(first, int(matrices[-1]) + 1, 0, 1), room)
    factors: Floats = held[matrices - first, 0]
    return factors


def _scales(shards: OpenShards, part: TensorInfo, across: int, cut: _Cut, room: DecodingRoom) -> Floats:
    """Some scales as values, shape (rows, columns)."""
    size = DTYPES[part.dtype].bits // 8
    read = cut._replace(left=cut.left * size, right=cut.right * size)
    with ExitStack() as stack:
        codes = _matrix(*_bytes(shards, part, across * size, read, room, stack), read)
        if part.dtype in _BYTES:
            return np.ascontiguousarray(_BYTES[part.dtype][codes])
        stored = np.ascontiguousarray(codes).view(f"<u{size}")
        if part.dtype == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.view(f"<f{size}").astype(np.float32)


def _zeros(shards: OpenShards, weight: Decoded, bits: int, upwards: int, cut: _Cut, room: DecodingRoom) -> Floats:
    """The field that stands for zero, of each of some scales, shape (rows, columns)."""
    part, across = weight.zeros, -(-weight.shape[-1] // weight.block[1])
    middle = 1 << (bits - 1)
    if part is None:
        return np.full((cut.bottom - cut.top, cut.right - cut.left), middle, np.float32)
    if part.dtype == "I8":
        with ExitStack() as stack:
            codes = _matrix(*_bytes(shards, part, across, cut, room, stack), cut)
            return codes.view(np.int8).astype(np.float32, order="C") + np.float32(middle)
    lines = np.arange(cut.top, cut.bottom)
    first = lines % upwards * bits
    words = lines // upwards * -(-upwards * bits // _WORD) + first // _WORD
    read = _Cut(int(words[0]), part.nbytes // (4 * across), 4 * cut.left, 4 * cut.right)
    read = read._replace(bottom=min(int(words[-1]) + 2, read.bottom))
    with ExitStack() as stack:
        codes = _matrix(*_bytes(shards, part, 4 * across, read, room, stack), read)
        held = np.ascontiguousarray(codes).view("<u4").astype(np.uint64)
    low = (first % _WORD).astype(np.uint64)[:, None]
    words -= read.top
    beyond = held[np.minimum(words + 1, len(held) - 1)] << (np.uint64(_WORD) - low)
    fields: NDArray[np.uint64] = (held[words] >> low | beyond) & np.uint64((1 << bits) - 1)
    return fields.astype(np.float32)


def _matrix(raw: NDArray[np.uint8], stride: int, cut: _Cut) -> NDArray[np.uint8]:
    """What was read as rows, without what lies between them."""
    rows = raw.reshape(cut.bottom - cut.top, stride)
    return rows[:, : cut.right - cut.left]


def _bytes(
    shards: OpenShards,
    tensor: TensorInfo,
    stride: int,
    cut: _Cut,
    room: DecodingRoom,
    stack: ExitStack,
    buffer: ByteArray | None = None,
) -> tuple[NDArray[np.uint8], int]:
    """Rows of a tensor, as a matrix of bytes, from a column on, read-only; and the bytes from one to the next.

    They are valid as long as the stack is open. A row that ends in padding is read with it.
    """
    if tensor.slices:
        return read_bytes_of(shards, tensor, stride, *cut, buffer), cut.right - cut.left
    reader, size, count = shards[tensor.shard], cut.right - cut.left, cut.bottom - cut.top
    start = tensor.start + cut.top * stride + cut.left
    if count == 1:
        stride = size
    if cut.left == 0 and stride - size < _PADDING:
        size = stride
    buffer = room.take("raw", count * size) if buffer is None else buffer[: count * size]
    if size == stride:
        return stack.enter_context(reader.window(tensor, start, start + count * size, buffer)), stride
    rows = buffer.reshape(count, size)
    reader.read_rows(tensor, start, stride, rows)
    view = buffer.view()
    view.flags.writeable = False
    return view, size
