"""Check that this machine computes what it should: a backend's answer to small pairs, beside the reference's."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.formats import FORMATS, Format
from ckptdiff.measure.backend import Backend
from ckptdiff.measure.decoding_self_test import coded_sources
from ckptdiff.measure.partial import Partial, Rule, Scan, Sum
from ckptdiff.measure.reference import ReferenceBackend
from ckptdiff.measure.source import InMemory, Source

SELF_TESTED = (
    ("bf16", "bf16", "bf16"),
    ("bf16", "f32", "bf16"),
    ("f32", "f32", "f32"),
    ("f16", "f16", "f16"),
    ("f8_e4m3", "f8_e4m3", "f8_e4m3"),
    ("f8_e5m2", "f8_e5m2", "f8_e5m2"),
    ("f64", "f64", "f64"),
)
"""Base, tuned and compare format of the pairs that a device has to get right before it is used."""
_NUMEL = 70_001
"""Weights: more than a tile of every backend, and no multiple of anything."""
_CODES = 1 << 16


def wrong_figures(backend: Backend) -> str:
    """What differs from the reference in the whole self-test; "" if nothing does."""
    wrong = [self_test(backend, names) for names in SELF_TESTED]
    return "; ".join(filter(None, [*wrong, decoding_test(backend) if backend.decodes else None]))


def self_test(backend: Backend, names: tuple[str, str, str] = SELF_TESTED[0]) -> str | None:
    """Measure two small pairs, one of weights and one of codes of every kind; returns what differs, None if nothing."""
    base, tuned, compare = (FORMATS[name] for name in names)
    above = Scan(base, tuned, compare, (0.0, 1e-5), 1e-3, Rule.ABOVE, 1e-3, want_mask=True)
    beyond = Scan(base, tuned, compare, (0.0, 1e-40), 1e-3, Rule.ETA, 0.25, want_mask=True)
    weights, codes = _weights(base, tuned), _codes(base, tuned)
    wrong = [*_compare(backend, above, weights, weights), *_compare(backend, beyond, codes, codes)]
    return f"{', '.join(dict.fromkeys(wrong))} of {'-'.join(names)}" if wrong else None


def decoding_test(backend: Backend) -> str | None:
    """Measure small pairs that are codes with scales; returns what differs, None if nothing."""
    wrong = []
    for what, (scan, source) in coded_sources().items():
        differ = _compare(backend, scan, source, InMemory(*source.right, source.numel))
        differ += [] if source.kept == source.right_kept else ["what codes have in common"]
        wrong += [f"{', '.join(differ)} of {what}"] if differ else []
    return "; ".join(wrong) or None


def _compare(backend: Backend, scan: Scan, source: Source, right_source: InMemory) -> list[str]:
    got, expected = Partial(), Partial()
    ours, theirs = backend.scan(scan, source, got), ReferenceBackend().scan(scan, right_source, expected)
    wrong = [] if ours is not None and theirs is not None and np.array_equal(ours, theirs) else ["mask"]
    for field in fields(Partial):
        found, right = getattr(got, field.name), getattr(expected, field.name)
        if field.name == "sums":
            same = found.shape == right.shape and bool((np.abs(found - right) <= 1e-12 * _added_up(right)).all())
        else:
            same = field.name == "span" or np.array_equal(found, right)
        wrong += [] if same else [field.name]
    return wrong


def _added_up(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """How large the terms of each sum are together, at least: sums of both signs may come out at nearly nothing."""
    sizes = np.abs(sums)
    sizes[:, Sum.DELTA] = sizes[:, Sum.ABS_DELTA]
    sizes[:, Sum.BASE_DELTA] += sizes[:, Sum.DELTA_SQUARE]
    return sizes


def _weights(base: Format, tuned: Format) -> InMemory:
    """Gaussian weights of which a third moved."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(_NUMEL) * 0.02
    moved = weights + np.where(rng.random(_NUMEL) < 0.3, 0.003, 0)
    return _pair(_encoded(base, weights), _encoded(tuned, moved))


def _encoded(format: Format, values: NDArray[np.float64]) -> NDArray[Any]:
    """Codes near values."""
    if format.bits > 16:
        return values.astype(f"f{format.bits // 8}").view(format.code_dtype)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        table = format.values().astype(np.float64)
    finite = np.flatnonzero(np.isfinite(table))
    order = finite[np.argsort(table[finite])]
    nearest = np.searchsorted(table[order], values)
    return order[np.minimum(nearest, order.size - 1)].astype(format.code_dtype)


def _codes(base: Format, tuned: Format) -> InMemory:
    """Every code of up to 16 bits on either side, and the leading 16 bits of wider ones with any bits below.

    First against unrelated ones: of formats of 8 bits each against each. Then against those that differ least, so that
    differences are as small as the format has them. A device that takes subnormal numbers for zero, on its way to the
    values, in differences or when it widens them, gets other figures.
    """
    rng = np.random.default_rng(1)
    leading = np.arange(_CODES, dtype=np.uint16)
    first = _with_leading(base, leading, rng)
    unrelated = _with_leading(tuned, leading.byteswap(), rng)
    near = first ^ first.dtype.type(1) if base == tuned else _with_leading(tuned, leading, rng)
    return _pair(np.tile(first, 2), np.concatenate([unrelated, near]))


def _with_leading(format: Format, leading: NDArray[np.uint16], rng: np.random.Generator) -> NDArray[Any]:
    """Codes that begin with 16 bits; of fewer bits, the last of them."""
    if format.bits <= 16:
        return leading.astype(format.code_dtype)
    if format.bits == 64:  # squares of finite values from 2 on are taken back into what float64 holds
        leading = np.where(leading & 0x7FF0 == 0x7FF0, leading, leading & 0xBFFF).astype(np.uint16)
    below = format.bits - 16
    codes: NDArray[Any] = leading.astype(format.code_dtype) << below
    codes |= rng.integers(0, 1 << below, leading.size, format.code_dtype)
    return codes


def _pair(base: NDArray[Any], tuned: NDArray[Any]) -> InMemory:
    return InMemory(base.view(np.uint8), tuned.view(np.uint8), base.size)
