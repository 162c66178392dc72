"""Load the kernels that a run will call, or have them compiled by processes of their own.

What the compiler takes it never gives back: a process that compiled its kernels would have half of its memory left for
data. And one such process is busy on one core only.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from ckptdiff.checkpoint import Kind, TensorPair
from ckptdiff.events import Listener, Note, Stage, stage
from ckptdiff.formats import FORMATS, Format, Formats, formats_of
from ckptdiff.interrupts import raise_pending
from ckptdiff.jit import NotCachedError, only_cached
from ckptdiff.measure.backend import Backend, Batching
from ckptdiff.measure.kernels.row import fill_row
from ckptdiff.measure.kernels.tiles import totals_of
from ckptdiff.measure.open_cuts import (
    DeltaCut,
    LowCut,
    first_delta_cut,
    first_low_cuts,
    refine_delta_cut,
    refine_low_cut,
)
from ckptdiff.measure.partial import Partial, Refined, Rule, Scan, Targets
from ckptdiff.measure.ranks import ranks_of, tables_of
from ckptdiff.measure.records import empty_records
from ckptdiff.measure.source import InMemory, SmallPairs
from ckptdiff.measure.thresholds import EPS, ETA
from ckptdiff.options import Compare
from ckptdiff.runfile.compress import compress_chunk

Use: TypeAlias = tuple[str, ...]
"""A call of kernels, as words that another process can be given.

"alike", "alone" or "refine" with the formats of base, tuned side and comparison; "row"; "mask" with the bytes
of a chunk; "panel" with the stored format and that of the comparison; "scores"; "sparse"; "decoded"; "boxes"; "delta";
"steps", those of training; "track" with the format of the comparison.
"""

_AT_ONCE = 2
"""Compiling processes; each takes some 250 MB."""
_POLL = 0.01
"""Seconds between two looks at them, and for a signal."""
_HOME = Path(__file__).parents[2]
_ONCE, _EACH_TIME = "once for this version on this machine", "each time: there is no folder to keep them in"

logger = logging.getLogger("ckptdiff.run.warm_up")


@dataclass(frozen=True, slots=True)
class Uses:
    """The kernels of a run."""

    certain: tuple[Use, ...]
    """What it will call; what takes longest to compile comes first, so that it is not the last that is waited for."""
    seldom: tuple[Use, ...] = ()
    """What it may come to call: not worth loading, but to be compiled along with others."""


def uses(alike: Set[Formats], alone: Set[Formats], mask_chunk: int, reading: Sequence[str] = ()) -> Uses:
    """What a run will call, given the formats of small tensors that are measured in one call, and of all others.

    ``mask_chunk`` is in bytes, 0 without masks; ``reading`` holds "decoded" if a side is quantised, "boxes" if one lies
    in parts of rows.
    """
    mask = [("mask", str(mask_chunk))] if mask_chunk else []
    row = [("row",)]
    # A few of the small tensors need another pass, which they make one by one; of wide formats all need one.
    narrow = {formats for formats in alike | alone if formats[2].bits <= 16}
    wide = alone - narrow
    return Uses(
        (
            *_named("alike", alike),
            *_named("alone", alone),
            *(row if alone else []),
            *_named("refine", wide),
            *((kind,) for kind in reading),
            *mask,
        ),
        (*_named("alone", alike - alone), *(row if alike and not alone else []), *_named("refine", narrow)),
    )


def _named(kind: str, all_formats: Set[Formats]) -> list[Use]:
    return sorted((kind, *(format.name for format in formats)) for formats in all_formats)


def panel_uses(pairs: Iterable[TensorPair], compare: Compare) -> list[Use]:
    """What it takes to decode the matrices of these pairs, and to multiply their updates."""
    kinds = {(pair.base.dtype, pair.tuned.dtype) for pair in pairs if pair.base.kind is Kind.FLOAT}
    formats = [formats_of(*kind, compare) for kind in kinds]
    return [("sparse",), *sorted({("panel", side.name, found[2].name) for found in formats for side in found[:2]})]


def load(worker: Backend | None, asked: Uses, tell: Listener) -> None:
    """Make the calls, each on a few coordinates, so that later ones find their kernels in this process.

    ``worker`` is that of Numba's kernels, None if there is no comparison; if some are missing, a stage "compiling" is
    told.
    """
    missing = [use for use in asked.certain if not _load_cached(worker, use)]
    if not missing:
        return
    from ckptdiff.kernel_cache import cache_folder

    kept = cache_folder() is not None
    apart = [*missing, *asked.seldom] if kept else []
    tell(Note(f"compiling kernels, {_ONCE if kept else _EACH_TIME}"))
    with stage(tell, "compiling", len(apart) or len(missing), "kernels") as told:
        compile_apart(apart, told)
        for done, use in enumerate(missing):
            make_call(worker, use)  # and compiles what another process could not
            told.at(done + 1, _ONCE if kept else _EACH_TIME)


def _load_cached(worker: Backend | None, use: Use) -> bool:
    try:
        with only_cached():
            make_call(worker, use)
    except NotCachedError:
        return False
    return True


def make_call(worker: Backend | None, use: Use) -> None:
    """Call the kernels of one use; NotCachedError within :func:`only_cached`, if one would have to be compiled."""
    kind, *words = use
    if kind == "mask":
        size = int(words[0])
        compress_chunk(np.arange(size).astype(np.uint8), size)
        return
    if not words:
        {
            "row": _fill_row,
            "scores": _count_scores,
            "sparse": _skip_zeros,
            "decoded": _decode_weight,
            "boxes": _read_box,
            "delta": _code_block,
            "steps": _step_nothing,
        }[kind]()
        return
    formats = [FORMATS[name] for name in words]
    if kind == "panel":
        _decode(*formats)
        return
    if kind == "track":
        _follow(*formats)
        return
    assert worker is not None
    base, tuned, compare = formats
    scan, source = Scan(base, tuned, compare, EPS, ETA, Rule.BITWISE, want_mask=True), _two_coordinates(base, tuned)
    if kind == "alike":
        assert isinstance(worker, Batching)
        (window,) = source.windows()
        worker.scan_small(scan, SmallPairs(window.base, window.tuned, np.array([source.numel])), empty_records(1))
    elif kind == "alone":
        worker.scan(scan, source, Partial())
    else:
        targets = Targets(16)
        worker.refine(scan, targets, source, Refined.empty(targets))


def compile_apart(missing: Sequence[Use], told: Stage | None = None) -> None:
    """Have kernels compiled and kept by processes of their own; the caller compiles what they could not.

    Processes that still run when an exception ends this are killed.
    """
    if not Path(sys.executable or "").name.startswith("python"):
        return  # another program with Python inside, which would start itself once more
    waiting = list(missing)
    running: dict[Use, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < _AT_ONCE:
                use = waiting.pop(0)
                running[use] = _start(use)
            time.sleep(_POLL)
            raise_pending()  # first of all: a terminal's Ctrl-C ends those processes too
            for use, process in list(running.items()):
                if process.poll() is not None:
                    process.communicate()
                    del running[use]
                    if process.returncode:
                        logger.warning("compiling %s apart ended with %d", " ".join(use), process.returncode)
            if told is not None:
                told.at(len(missing) - len(waiting) - len(running), _ONCE)
    except OSError as error:
        logger.warning("kernels are compiled in this process, no other can be started: %s", error)
    finally:
        for process in running.values():
            process.kill()
            process.communicate()


def _start(use: Use) -> subprocess.Popen[bytes]:
    command = python_command(f"from ckptdiff.run.warm_up import compile_for; compile_for({use!r})")
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def python_command(code: str) -> list[str]:
    """A command that runs code with the packages of this process, and with none from a working directory.

    That may not be the one it was when this process took its own.
    """
    paths = [path for path in sys.path if isinstance(path, str) and Path(path).is_absolute()]
    # Docstrings are part of what the cache knows a kernel by.
    flags = ["-I", *["-O"] * sys.flags.optimize]
    return [sys.executable, *flags, "-c", f"import sys; sys.path[:] = {[*paths, str(_HOME)]!r}\n{code}"]


def compile_for(use: Use) -> None:
    """What a process of its own does: call the kernels once, which compiles them and keeps their machine code.

    It ends with its standard input, which the process that waits for it holds open: whatever befalls that one, no
    compiler is left running.
    """
    threading.Thread(target=_end_with_input, daemon=True).start()
    from ckptdiff.measure.cpu import CpuBackend

    make_call(CpuBackend(), use)


def _end_with_input() -> None:
    os.read(0, 1)
    os._exit(1)


def _fill_row() -> None:
    """And what finds the cuts that a row leaves open."""
    partial, counts = Partial(), np.ones((2, 1), np.int64)
    partial.open_blocks(1, len(EPS))
    fill_row(totals_of(partial, 1), ranks_of(np.array([2])), tables_of(FORMATS["bf16"]), 0, empty_records(1))
    first_delta_cut(partial, 64, 1)
    first_low_cuts(partial, FORMATS["bf16"], [1])
    refine_delta_cut(DeltaCut(1, 64, 0, 16, 0, 1, 0.0), counts[0])
    refine_low_cut(LowCut(1, 0, 16, 0, 1, 0, 1), counts)


def _count_scores() -> None:
    from ckptdiff.linalg.score_cut import ScoreCut, ScoreCuts
    from ckptdiff.linalg.separate_pairs import pairs_of_tridiagonal
    from ckptdiff.linalg.stages import ArrayPanels, run_together
    from ckptdiff.linalg.survey import survey
    from ckptdiff.measure.rounding_null import change_chances

    values = np.array([[1.0], [2.0]], np.float32)
    (known,) = run_together(source := ArrayPanels(values, values), survey())
    cuts = ScoreCuts([ScoreCut(1, 1.0, np.zeros(len(known.weights)), next(known.low_cuts([0.5])), 1.0)])
    cuts.add(values, next(source.panels()))
    change_chances(2 * known.weights, known.weights)
    pairs_of_tridiagonal(np.ones(1), np.zeros(2), 0, 0)


def _skip_zeros() -> None:
    from ckptdiff.linalg.kernels.pair_products import BLOCK, add_packed_gram, pack_pairs
    from ckptdiff.linalg.nonzeros import Nonzeros
    from ckptdiff.linalg.on_numpy import NUMPY

    packed, one = np.zeros((2, 1, BLOCK), np.uint32), np.zeros((1, 1), np.float32)
    pack_pairs(one.view(np.uint32), packed, 0, 0)
    add_packed_gram(one, packed, 0, 0, one)  # of no block: not all processors have what it multiplies with
    for dtype in (np.float32, np.float64):
        still = np.zeros((1, 1), dtype)
        NUMPY.squares(still)
        Nonzeros(still).squared_product(still)


def _decode(stored: Format, compare: Format) -> None:
    from ckptdiff.spectra.panels import decode

    decode(np.frombuffer(bytes(stored.bits // 8), np.uint8), stored, compare, np.empty(1, np.float32))


def _decode_weight() -> None:
    from ckptdiff.checkpoint.code_formats import CODES
    from ckptdiff.checkpoint.kernels.code_values import count_equal_codes, count_within_steps, decode_codes

    codes, values, matrix = np.zeros(1, np.uint8), np.zeros(1, np.float32), np.ones((1, 1), np.float32)
    stored = np.frombuffer(bytes(1), np.uint8)
    grid = matrix, matrix, np.zeros(1, np.int64), 1, 0
    decode_codes(stored, 1, 0, CODES["e4m3"], 0, grid, values, False, matrix, codes.reshape(1, 1), matrix)
    count_equal_codes(codes, codes, 1)
    count_within_steps(values, values, values, values, True)
    _read_box()


def _read_box() -> None:
    from ckptdiff.checkpoint.kernels.boxes import read_box

    with Path(os.devnull).open("rb") as nothing:
        read_box(nothing.fileno(), 0, 1, np.zeros((1, 1), np.uint8))


def _code_block() -> None:
    from ckptdiff.patch.coded_block import Coding, apply_block, code_block, read_block
    from ckptdiff.patch.small_tensors import apply_small, code_small

    base, coding = np.zeros(1 << 10, np.uint8), Coding(1, True)
    tuned = base.copy()
    tuned[0] = 7  # and no more: what changed everywhere would be stored whole
    coded, _ = code_block(base, tuned, coding)
    apply_block(base, read_block(coded, base.size, coding), coding)
    base[:], blocks = 0, np.array([[0, base.size, 1, 1]])
    ((coded, _),) = code_small(base, tuned, blocks)
    apply_small(base, blocks, coded, [len(coded)])


def _step_nothing() -> None:
    from ckptdiff.retrain.kernels.mask_bits import add_bits
    from ckptdiff.retrain.kernels.masked_steps import MASKED, masked_steps, sum_masked_squares
    from ckptdiff.retrain.kernels.outside import OUTSIDE, prepare, restore

    bits, counter = np.zeros(1, np.uint8), np.zeros(1, np.int64)
    add_bits(bits, 0, 0, 1, bits, 0, 0, 1, 1, 1)
    masked_steps(np.empty(0, MASKED), np.empty((0, 6), np.float32), counter)
    sum_masked_squares(np.empty(0, MASKED), np.zeros(1), counter)
    for code in (np.uint16, np.uint32, np.uint64):
        prepare(np.empty(0, OUTSIDE), np.empty(0, code), counter)
        restore(np.empty(0, OUTSIDE), np.empty(0, code), counter)


def _follow(compare: Format) -> None:
    from ckptdiff.measure.kernels.tiles import facts_of
    from ckptdiff.track.kernels.trajectory import Flow, follow_spans, new_rooms

    code = max(compare.code_dtype, np.dtype(np.uint16))
    nothing, files, tables = np.empty((0, 3), np.int64), np.zeros((1, 2, 5), np.int64), np.zeros((2, 0), code)
    found = np.zeros((0, 1, len(Flow)), np.int64), np.zeros((0, 2)), np.zeros((0, 0, 1))
    magnitude = code.type(compare.magnitude)
    follow_spans(nothing, files, tables, facts_of(compare).values, magnitude, new_rooms(code, 2, 0), *found, 1)


def _two_coordinates(base: Format, tuned: Format) -> InMemory:
    """One of which changed: what nothing or everything changed in takes shorter ways."""
    sides = bytes(base.bits // 4), bytes(tuned.bits // 8) + b"\x3c" * (tuned.bits // 8)
    return InMemory(np.frombuffer(sides[0], np.uint8), np.frombuffer(sides[1], np.uint8), 2)
