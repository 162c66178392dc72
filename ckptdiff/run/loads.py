"""Say what each pair is to read and to hold in memory: arithmetic of sizes, for tasks and the projection."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from ckptdiff.checkpoint import Kind, TensorInfo, TensorPair
from ckptdiff.checkpoint.boxes import is_contiguous, room_to_read, runs_of
from ckptdiff.checkpoint.region import read_numel
from ckptdiff.checkpoint.weights import CommonPart, Decoded, Weight, stored_as
from ckptdiff.formats import formats_of
from ckptdiff.measure.partial import BLOCK
from ckptdiff.measure.passes import one_scan_suffices
from ckptdiff.options import Options
from ckptdiff.run.coded_pair import goes_as_codes, room_to_send
from ckptdiff.run.devices import Device
from ckptdiff.run.tasks import Grain, Load

__all__ = ["loads_of"]


def loads_of(
    pairs: tuple[TensorPair, ...], options: Options, device: Device, io: str, grain: Grain
) -> tuple[Load, ...]:
    """The load of each pair; small ones of the same formats go together where there are many of them."""
    shared: dict[Hashable, Load] = {}
    loads: list[Load] = []
    for one in pairs:
        equal = one.same_bytes, options.quick and one.known_equal
        what = (*_reading(one.base), *_reading(one.tuned), one.base.numel, one.rows is None, *equal)
        load = shared.get(what)
        if load is None:
            load = shared[what] = _load(one, options, device)
        loads.append(load)
    if device.batches and io == "pread" and sum(load.kind is not None for load in loads) >= grain.many:
        return tuple(loads)
    alone = {id(load): replace(load, kind=None) for load in shared.values()}
    return tuple(alone[id(load)] for load in loads)


def _load(pair: TensorPair, options: Options, device: Device) -> Load:
    same, numel = pair.same_bytes, pair.base.numel
    if options.quick and pair.known_equal:
        return Load(numel, ())
    sides: list[Weight] = [pair.base] if same else [pair.base, pair.tuned]
    # Of codes with scales, what they take together.
    bits = tuple(8 * side.nbytes // max(numel, 1) for side in sides)
    if device.decodes and goes_as_codes(pair.base, pair.tuned):
        reading = room_to_send(pair.base, pair.tuned, min(numel, BLOCK))
    else:
        reading = sum(room_to_read(side, min(numel, BLOCK)) for side in sides)
    if pair.base.kind is not Kind.FLOAT:
        return Load(numel, bits, reading + min(numel, BLOCK) * 4)
    formats = formats_of(pair.base.dtype, pair.tuned.dtype, options.compare)
    alike = not same and 0 < numel <= BLOCK and one_scan_suffices(formats[2], options.mask)
    alike = (
        alike and pair.rows is None and all(is_contiguous(side) and len(runs_of(side, 0, numel)) == 1 for side in sides)
    )
    return Load(numel, bits, reading + device.scratch(numel), formats if alike else None)


def _reading(side: Weight) -> tuple[Hashable, ...]:
    """What tells how a side is read, beside its size."""
    if isinstance(side, TensorInfo) and not side.slices:
        return side.dtype, 1
    if isinstance(side, Decoded):
        return stored_as(side), (side.shape, side.block)
    if isinstance(side, CommonPart):
        return *_reading(side.whole), side.whole.numel, read_numel(side.region)
    return stored_as(side), is_contiguous(side) and len(runs_of(side, 0, side.numel))
