"""Apply an exact patch with NumPy and the standard library alone: a reference for readers in other languages.

    python examples/read_patch.py BASE.safetensors STEP.ckptdelta OUT.safetensors

BASE is one file; the tuned side of the patch has to be one too. Digests are not checked here.
"""

import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np

WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "C64": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
FLOATING = {"F64", "F32", "C64", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


def bits(stream: bytes, count: int) -> np.ndarray:
    """The first bits of a stream, lowest first."""
    return np.unpackbits(np.frombuffer(stream, np.uint8), bitorder="little")[:count].astype(np.uint64)


def number(of_bits: np.ndarray) -> int:
    """A whole number, its lowest bit first."""
    return sum(int(bit) << place for place, bit in enumerate(of_bits))


def apply_block(coded: bytes, codes: np.ndarray, floating: bool) -> None:
    """Change a block of codes (unsigned integers) in place."""

    def take() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = coded[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def stream(size: int, stored: int) -> bytes:
        nonlocal at
        data, at = coded[at : at + stored], at + stored
        return zlib.decompress(data) if stored < size else data

    at = 0
    if take() == 1:  # the block itself
        codes[:] = np.frombuffer(stream(codes.nbytes, take()), codes.dtype)
        return
    count, shift, coding = take(), take(), take()
    sizes = [(take(), take()) for _ in range(4)]
    gaps, low, symbols, extra = (stream(*size) for size in sizes)
    if shift == 255:  # a bitmap
        positions = np.flatnonzero(bits(gaps, codes.size))
    else:
        ends = np.flatnonzero(np.frombuffer(gaps, np.uint8) < 255)  # a byte of 255 goes on in the next
        sums = np.cumsum(np.frombuffer(gaps, np.uint8), dtype=np.int64)[ends]
        steps = np.diff(sums, prepend=0) << shift
        if shift:
            steps += [number(part) for part in bits(low, count * shift).reshape(count, shift)]
        positions = np.cumsum(steps + 1) - 1
    bytes_of = np.frombuffer(symbols, np.uint8)
    z = np.stack([bytes_of & 15, bytes_of >> 4], 1).reshape(-1)[:count] if coding == 0 else bytes_of
    z, tail, place = [int(one) for one in z], bits(extra, 8 * len(extra)), 0
    for k, symbol in enumerate(z):
        if symbol == 15 if coding == 0 else symbol >= 192:
            length = number(tail[place : place + 6]) if coding == 0 else symbol - 185
            place += 6 if coding == 0 else 0
            z[k] = 1 << length | number(tail[place : place + length])
            place += length
    width = 8 * codes.dtype.itemsize
    sign, full = 1 << (width - 1), (1 << width) - 1
    for position, one in zip(positions.tolist(), z, strict=True):
        code = int(codes[position])
        if floating:  # to its place in the order of values
            code = ~code & full if code & sign else code | sign
        code = (code + (-(one // 2) - 1 if one % 2 else one // 2 + 1)) & full
        if floating:
            code = code ^ sign if code & sign else ~code & full
        codes[position] = code


def main(base: str, patch: str, out: str) -> None:
    """Write the tuned file that a patch makes of a base."""
    raw, old = Path(patch).read_bytes(), Path(base).read_bytes()
    signature, offset, stored, _, _ = struct.unpack("<8sQQQ32s", raw[-64:])
    assert raw[:8] == signature == b"CKPTDLT1"
    index = json.loads(zlib.decompress(raw[offset : offset + stored]))
    header_size = 8 + int.from_bytes(old[:8], "little")
    header = json.loads(old[8:header_size])
    (file,) = index["tuned"]["files"]
    made = [zlib.decompress(raw[file[2] : file[2] + file[3]])]
    for tensor in index["tensors"]:
        if tensor["state"] == "lost":
            continue
        width = WIDTHS.get(tensor["dtype"], 1)
        if tensor["state"] == "whole":  # every block of it is in the patch
            data = np.zeros(file[1], np.uint8)[: sum_of(tensor)]
        else:
            start, stop = header[tensor["name"]]["data_offsets"]
            data = np.frombuffer(old[header_size + start : header_size + stop], np.uint8).copy()
        codes, at = data.view(f"<u{width}"), tensor["offset"]
        for block, size in enumerate(tensor["sizes"]):
            if size:
                part = codes[block * index["block"] : (block + 1) * index["block"]]
                apply_block(raw[at : at + size], part, tensor["dtype"] in FLOATING)
            at += size
        made.append(data.tobytes())
    Path(out).write_bytes(b"".join(made))


def sum_of(tensor: dict) -> int:
    """Bytes of a tensor."""
    small = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}
    return (
        int(np.prod(tensor["shape"], dtype=object))
        * small.get(tensor["dtype"], 8 * WIDTHS.get(tensor["dtype"], 1))
        // 8
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
