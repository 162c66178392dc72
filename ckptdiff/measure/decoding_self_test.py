"""Check that a device decodes codes with scales as it should: its answer to small pairs, beside NumPy's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from ckptdiff.formats import FORMATS, round_to_bf16
from ckptdiff.measure.code_box import CodeBox, Meaning
from ckptdiff.measure.cuda.coded_side import SideWriter
from ckptdiff.measure.partial import Rule, Scan
from ckptdiff.measure.source import ByteArray, Window

COLUMNS = 1 << 11
"""Of a row: launches begin at multiples of it."""
NUMEL = 34 * COLUMNS + 369
"""Values: more than two tiles of every backend, and the last row is not whole."""
_ROWS = -(-NUMEL // COLUMNS)
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TrialSide:
    """A side that is codes with scales.

    Attributes
    ----------
    meaning : Meaning
    codes : uint8 array, shape (rows, COLUMNS)
        One to a byte.
    scales, zeros : float32 array, shape (k, l)
        For as many rows and columns each as come out. The latter (0, 0) if there are none.
    factors : float32 array, shape (rows,)
    """

    meaning: Meaning
    codes: NDArray[np.uint8]
    scales: Floats
    zeros: Floats
    factors: Floats

    @property
    def _block(self) -> tuple[int, int]:
        return -(-_ROWS // len(self.scales)), COLUMNS // self.scales.shape[1]

    @property
    def worth(self) -> tuple[Floats, Floats]:
        """Values and steps, shape (NUMEL,): the operations of the decoder of the processor, in its order."""
        height, width = self._block
        scales, factors = self.scales.repeat(height, 0)[:_ROWS].repeat(width, 1), self.factors[:, None]
        values, steps = self.meaning.values[self.codes], self.meaning.steps[self.codes]
        with np.errstate(all="ignore"):
            fields = values - self.zeros.repeat(height, 0)[:_ROWS].repeat(width, 1) if self.zeros.size else values
            bring = np.divide if self.meaning.divides else np.multiply
            scaled, steps = bring(fields * scales, factors), bring(steps * np.abs(scales), np.abs(factors))
        worth = np.where(np.isnan(scaled), np.copysign(np.float32(np.nan), fields), scaled)
        return worth.reshape(-1)[:NUMEL], steps.reshape(-1)[:NUMEL]

    def write(self, first: int, stop: int, room: ByteArray) -> None:
        """Some coordinates, from the first of a row on, as they go up."""
        writer, top = SideWriter(room, self.meaning), first // COLUMNS
        parts = [(top, stop // COLUMNS, COLUMNS), (stop // COLUMNS, stop // COLUMNS + 1, stop % COLUMNS)]
        for top, bottom, columns in parts:
            if top == bottom or not columns:
                continue
            codes = self.codes[top:bottom, :columns, None] ^ np.uint8(self.meaning.flip)
            bits = np.unpackbits(codes, axis=2, count=self.meaning.bits, bitorder="little")
            raw = np.packbits(bits.reshape(bottom - top, -1), axis=1, bitorder="little")
            (height, width), rows = self._block, np.arange(top, bottom)
            lines, factors = rows // height - top // height, self.factors[top:bottom]
            cut = slice(top // height, (bottom - 1) // height + 1)
            places = self.scales[cut], self.zeros[cut], lines, width, 0
            writer.add(CodeBox(raw.reshape(-1), raw.shape[1], 0, *places, factors, columns))


class CodedSource:
    """A source of which a side or both are codes with scales, and what is right to find in it.

    Attributes
    ----------
    right : tuple of ByteArray
        Both sides as values.
    kept : tuple of int, or None
        What was counted.
    """

    counts, numel = True, NUMEL

    def __init__(self, base: TrialSide | NDArray[np.uint16], tuned: TrialSide) -> None:
        self._base, self._tuned = base, tuned
        self.sides = isinstance(base, TrialSide), True
        stored = base.worth[0] if isinstance(base, TrialSide) else base
        self.right = stored.view(np.uint8), tuned.worth[0].view(np.uint8)
        self.kept: tuple[int, int, int] | None = None

    def windows(self) -> Iterator[Window]:
        """One window on everything."""
        nowhere = np.empty((0, 3), np.int64)
        yield Window(0, NUMEL, nowhere, nowhere, self)

    def fail(self, first: int, stop: int) -> NoReturn:
        """Memory does not fail."""
        raise AssertionError(f"coordinates {first} to {stop} were not measured")

    def most_bytes(self, numel: int) -> int:
        """No more than values take."""
        return 4 * numel

    def read(self, first: int, stop: int, base: ByteArray, tuned: ByteArray) -> None:
        """Write what goes up."""
        if isinstance(self._base, TrialSide):
            self._base.write(first, stop, base)
        else:
            base[:] = self.right[0][2 * first : 2 * stop]
        self._tuned.write(first, stop, tuned)

    def found(self, equal_codes: int, changed: int, within: int) -> None:
        """Keep what the device counted."""
        self.kept = equal_codes if isinstance(self._base, TrialSide) else 0, changed, within

    @property
    def right_kept(self) -> tuple[int, int, int]:
        """The same by NumPy."""
        theirs, steps = self._tuned.worth
        if not isinstance(self._base, TrialSide):
            ours = (self._base.astype(np.uint32) << 16).view(np.float32)
            return 0, *_counted(ours, theirs, steps, 16)
        ours, others = self._base.worth
        one, other = (side.codes.reshape(-1)[:NUMEL] for side in (self._base, self._tuned))
        equal = (one == other) | (((one | other) & self._base.meaning.magnitude) == 0)
        return int(np.count_nonzero(equal)), *_counted(ours, theirs, np.where(steps > others, steps, others), 32)


def coded_sources() -> dict[str, tuple[Scan, CodedSource]]:
    """What a device has to decode, by what it is: every code of both formats of fp8, and packed integers.

    Scales are zero, infinite and NaN too, and so small that values are subnormal.
    """
    rng = np.random.default_rng(2)
    e4m3, e5m2 = (_of_fp8(rng, name) for name in ("f8_e4m3", "f8_e5m2"))
    integers = _of_integers(rng)
    plain = _bf16(e5m2.worth[0]) ^ (rng.random(NUMEL) < 0.3).astype(np.uint16)
    scans = {
        "e4m3 and integers": (("f32", "f32", "f32"), CodedSource(e4m3, integers)),
        "bf16 and e5m2": (("bf16", "f32", "bf16"), CodedSource(plain, e5m2)),
    }
    found = {}
    for what, (names, source) in scans.items():
        base, tuned, compare = (FORMATS[name] for name in names)
        found[what] = Scan(base, tuned, compare, (0.0, 1e-40), 1e-3, Rule.ETA, 0.25, want_mask=True), source
    return found


def _of_fp8(rng: np.random.Generator, name: str) -> TrialSide:
    values = FORMATS[name].values()
    meaning = Meaning(8, 0, 0x7F, False, values, np.exp2(rng.integers(-9, 9, 256)).astype(np.float32))
    codes = rng.permutation(np.arange(_ROWS * COLUMNS) % 256).astype(np.uint8).reshape(_ROWS, COLUMNS)
    scales = np.exp2(rng.uniform(-140, 0, (-(-_ROWS // 4), COLUMNS // 128))).astype(np.float32)
    scales[:3, 0] = 0, np.inf, -np.nan
    factors = rng.uniform(0.5, 2, _ROWS).astype(np.float32)
    factors[5] = 0
    return TrialSide(meaning, codes, scales, np.empty((0, 0), np.float32), factors)


def _of_integers(rng: np.random.Generator) -> TrialSide:
    """Of three bits, which lie across bytes."""
    meaning = Meaning(3, 1, 0xFF, True, np.arange(8, dtype=np.float32), np.ones(8, np.float32))
    codes = rng.integers(0, 8, (_ROWS, COLUMNS), np.uint8)
    scales = np.exp2(rng.uniform(-140, 0, (_ROWS, COLUMNS // 16))).astype(np.float32)
    zeros = rng.integers(0, 8, scales.shape).astype(np.float32)
    return TrialSide(meaning, codes, scales, zeros, rng.uniform(0.5, 2, _ROWS).astype(np.float32))


def _bf16(values: Floats) -> NDArray[np.uint16]:
    """Leading bits of values, of a NaN the quiet one."""
    return np.where(np.isnan(values), 0x7FC0, values.view(np.uint32) >> 16).astype(np.uint16)


def _counted(ours: Floats, theirs: Floats, steps: Floats, bits: int) -> tuple[int, int]:
    """Values that differ as floats of so many bits, and those that do by no more than a step."""
    one, other = (values.view(np.uint32) for values in (ours, theirs))
    if bits == 16:
        one, other = (np.left_shift(round_to_bf16(codes), 16, dtype=np.uint32) for codes in (one, other))
    differ = (one != other) & ((one | other) << 1 != 0)
    with np.errstate(all="ignore"):
        apart = np.abs(ours - theirs)
        near = (apart <= steps * np.float32(1 + 2.0**-12)) & (apart < np.inf)
    return int(np.count_nonzero(differ)), int(np.count_nonzero(differ & near))
