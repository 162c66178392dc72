"""Apply an exact patch with NumPy and the standard library: a reference for readers in other languages.

    python examples/read_patch.py BASE.safetensors STEP.ckptdelta OUT.safetensors

Both sides are one file each. Whoever is to be trusted also compares the digests of the index.
"""

import json
import sys
import zlib
from io import BytesIO

import numpy as np

WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "C64": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
FLOATING = {"F64", "F32", "C64", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


def apply_block(coded: BytesIO, codes: np.ndarray, floating: bool) -> None:
    """Change a block of codes, which are unsigned integers, in place."""

    def number() -> int:  # seven bits a byte, lowest first; the high bit says that more follow
        byte = coded.read(1)[0]
        return byte if byte < 128 else byte - 128 + (number() << 7)

    def stream(size: int, stored: int) -> np.ndarray:  # deflated where that is shorter
        return np.frombuffer(zlib.decompress(coded.read(stored)) if stored < size else coded.read(stored), np.uint8)

    def value(bits: np.ndarray) -> np.ndarray:  # lowest bit first
        return bits @ (np.uint64(1) << np.arange(bits.shape[-1], dtype=np.uint64))

    if number() == 1:  # the new codes themselves
        codes[:] = stream(codes.nbytes, number()).view(codes.dtype)
        return
    count, shift, coding = number(), number(), number()
    gaps, low, symbols, extra = (stream(*sizes) for sizes in [(number(), number()) for _ in range(4)])
    low, extra = (np.unpackbits(one, bitorder="little") for one in (low, extra))
    if shift == 255:  # which codes changed, as a bitmap
        places = np.flatnonzero(np.unpackbits(gaps, bitorder="little"))
    else:  # or how many lie between: the high parts, of which a byte of 255 goes on in the next, and the low bits
        high = np.diff(np.cumsum(gaps, dtype=np.uint64)[gaps < 255], prepend=np.uint64(0)) << np.uint64(shift)
        places = np.cumsum(high + value(low[: count * shift].reshape(count, shift)) + np.uint64(1)) - np.uint64(1)
    z, at = (symbols if coding else np.stack([symbols & 15, symbols >> 4], 1).ravel()[:count]).astype(np.uint64), 0
    for k in np.flatnonzero(z >= 192 if coding else z == 15):  # large ones: how many bits they have but one, and these
        size, at = (int(z[k]) - 185, at) if coding else (int(value(extra[at : at + 6])), at + 6)
        z[k], at = np.uint64(1 << size) | value(extra[at : at + size]), at + size
    steps = np.where(z & np.uint64(1), ~(z >> np.uint64(1)), (z >> np.uint64(1)) + np.uint64(1)).astype(codes.dtype)
    old, sign = codes[places], codes.dtype.type(1 << (8 * codes.itemsize - 1))
    new = steps + (np.where(old & sign, ~old, old | sign) if floating else old)  # steps in the order of values, modulo
    codes[places] = np.where(new & sign, new ^ sign, ~new) if floating else new


def main(base: str, patch: str, out: str) -> None:
    """Write the tuned file that a patch makes of a base."""
    raw, old = np.fromfile(patch, np.uint8), np.fromfile(base, np.uint8)
    assert bytes(raw[:8]) == bytes(raw[-64:-56]) == b"CKPTDLT1"
    offset, stored = raw[-56:-40].view("<u8").tolist()
    index, start = json.loads(zlib.decompress(raw[offset : offset + stored])), 8 + int(old[:8].view("<u8")[0])
    ((_, _, at, stored, _),) = index["tuned"]["files"]
    made = [np.frombuffer(zlib.decompress(raw[at : at + stored]), np.uint8)]  # the header of the result
    headers = [json.loads(bytes(header[8:])) for header in (old[:start], made[0])]
    for tensor in (one for one in index["tensors"] if one["state"] != "lost"):  # in the order of their bytes
        whole = tensor["state"] == "whole"
        first, last = headers[whole][tensor["name"]]["data_offsets"]
        made.append(np.zeros(last - first, np.uint8) if whole else old[start + first : start + last])
        codes = made[-1].view(f"<u{WIDTHS.get(tensor['dtype'], 1)}")
        ends = np.cumsum([tensor["offset"], *tensor["sizes"]])
        for block in np.flatnonzero(tensor["sizes"]):  # those in which something changed
            part = codes[block * index["block"] : (block + 1) * index["block"]]
            apply_block(BytesIO(raw[ends[block] : ends[block + 1]]), part, tensor["dtype"] in FLOATING)
    np.concatenate(made).tofile(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
