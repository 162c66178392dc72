"""How near the CUDA backend comes to what GPU, bus and files allow; each word is a program of its own.

    python bench/gpu.py rates                     # GPU memory, bus, scan kernel, pipeline of one thread, one CPU thread
    python bench/gpu.py kernels                   # the scan kernel over data that is easy and hard for its histograms
    python bench/gpu.py start                     # context, compiler, pinned memory, first and second scan
    python bench/gpu.py whole BASE TUNED --device cuda --threads 16 --masks --max-memory 8G
    python bench/gpu.py reads                     # how to fill pinned memory; needs no GPU

Rates count both sides. `--figures FILE` keeps what is printed as JSON. `GPU.md` says what to expect; `on_gpu.py` runs
all of it and more.
"""

from __future__ import annotations

import argparse
import mmap
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from make_pair import parse_size
from measure import table, write_json

import ckptdiff
from ckptdiff.formats import FORMATS, Format
from ckptdiff.measure.backend import Backend
from ckptdiff.measure.cpu import CpuBackend
from ckptdiff.measure.cuda import choice
from ckptdiff.measure.cuda.backend import CudaBackend
from ckptdiff.measure.cuda.gpu import Gpu
from ckptdiff.measure.cuda.layout import DEVICE_TILE, RECORD, ROWS, TILE_RECORD, scan_settings
from ckptdiff.measure.cuda.slots import Room
from ckptdiff.measure.partial import BINS, Partial, Rule, Scan, Sum
from ckptdiff.measure.source import InMemory, Window, read_runs
from ckptdiff.memory import peak_resident, resident

BF16, F16, F32, E4M3, E5M2 = (FORMATS[name] for name in ("bf16", "f16", "f32", "f8_e4m3", "f8_e5m2"))
EPS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
TILED = (1 << 22) + 9973
"""Coordinates of which large sides are made, again and again."""
Rows = Iterator[dict[str, Any]]


def scan_of(format: Format) -> Scan:
    """The scan of a run with the default mask."""
    return Scan(format, format, format, EPS, 1e-3, Rule.ABOVE, 1e-5, want_mask=True)


SCAN = scan_of(BF16)


class FromFiles(InMemory):
    """A source that is read from two open files."""

    def __init__(self, base: Any, tuned: Any, numel: int) -> None:
        self.numel, self._files = numel, (base, tuned)

    def windows(self) -> Any:
        """Everything."""
        base, tuned = (np.array([[0, file.fileno(), 0]]) for file in self._files)
        yield Window(0, self.numel, base, tuned)


def make_sides(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Bfloat16 codes of Gaussian weights, and the same with a tenth moved by a few units of the last place."""
    rng = np.random.default_rng(0)
    count = min(size // 2, TILED)
    base = ((rng.standard_normal(count, np.float32) * 0.02).view(np.uint32) >> 16).astype(np.uint16)
    moved = rng.random(count, np.float32) < 0.1
    tuned = base + moved * rng.integers(1, 4, count, np.uint16)
    return np.resize(base, size // 2), np.resize(tuned, size // 2)


def seconds(act: Callable[[], object], rounds: int) -> float:
    """Median of several rounds after one that is not counted."""
    took = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        act()
        took.append(time.perf_counter() - begun)
    return statistics.median(took[1:])


def gpu_rates(gpu: Gpu, base: np.ndarray, tuned: np.ndarray, rounds: int) -> dict[str, float]:
    """GB/s of writing GPU memory, of copies up and down, and of the scan kernel over what is there already."""
    stream, nbytes = gpu.stream(), base.nbytes
    host, side = gpu.pinned(nbytes), gpu.empty(nbytes)
    host[:] = base.view(np.uint8)

    def finished(queue: Callable[[], None]) -> Callable[[], None]:
        def act() -> None:
            queue()
            gpu.synchronize(gpu.record(stream))

        return act

    return {
        "GPU memory, written": nbytes / seconds(finished(lambda: gpu.clear(side, stream)), rounds) / 1e9,
        "bus, up": nbytes / seconds(finished(lambda: gpu.upload(side, host, stream)), rounds) / 1e9,
        "bus, down": nbytes / seconds(finished(lambda: gpu.download(host, side, stream)), rounds) / 1e9,
        "scan kernel": kernel_rate(gpu, BF16, base, tuned, rounds),
    }


def kernel_rate(gpu: Gpu, format: Format, base: np.ndarray, tuned: np.ndarray, rounds: int) -> float:
    """GB/s of the scan kernel over both sides in GPU memory, in one launch."""
    stream, nbytes, size = gpu.stream(), base.nbytes, format.bits // 8
    sides = gpu.empty(nbytes + 64), gpu.empty(nbytes + 64)
    tiles = np.zeros(-(-base.size // DEVICE_TILE), TILE_RECORD)
    starts = np.arange(tiles.size) * DEVICE_TILE
    tiles["base"], tiles["tuned"], tiles["mask"] = size * starts, size * starts, starts // 8
    tiles["numel"] = np.minimum(base.size - starts, DEVICE_TILE)
    host, on_gpu = gpu.pinned(max(nbytes, tiles.nbytes)), gpu.empty(tiles.nbytes)
    for data, target in ((tiles, on_gpu), (base, sides[0]), (tuned, sides[1])):
        host[: data.nbytes] = data.view(np.uint8)
        gpu.upload(target, host[: data.nbytes], stream)
        gpu.synchronize(gpu.record(stream))
    out = gpu.empty(base.size // 8 + 8), gpu.empty(tiles.size * 8 * len(Sum)), gpu.empty(RECORD.itemsize)
    bins = gpu.empty(ROWS * BINS * 8)
    settings = scan_settings(scan_of(format))

    def scan() -> None:
        arguments = [on_gpu, np.uint32(tiles.size), settings, *sides, *out, bins]
        gpu.launch((format, format, format), "scan", 2 * gpu.processors, arguments, stream)
        gpu.synchronize(gpu.record(stream))

    return 2 * nbytes / seconds(scan, rounds) / 1e9


def kernel_rows(gpu: Gpu, size: int, rounds: int) -> Rows:
    """The scan kernel where its atomic additions spread over many bins, over a few, and over one."""
    rng = np.random.default_rng(0)
    usual = make_sides(size)
    third = np.full(size // 2, 0x3CA4, np.uint16)  # 0.02
    single = np.full(size // 4, 0x3CA3D70A, np.uint32)
    count = min(size // 4, TILED)
    weights = (rng.standard_normal(count) * 0.02).astype(np.float32)

    def large(codes: np.ndarray, dtype: type) -> np.ndarray:
        return np.resize(codes, size // np.dtype(dtype).itemsize).astype(dtype, copy=False)

    singles, halves = weights.view(np.uint32), weights.astype(np.float16).view(np.uint16)
    tenth = rng.random(count, np.float32) < 0.1
    bytes_ = rng.integers(0x20, 0x40, count, np.uint8)
    cases: list[tuple[str, Format, np.ndarray, np.ndarray]] = [
        ("bf16, a tenth changed", BF16, *usual),
        ("bf16, all changed", BF16, usual[0], usual[0] + np.uint16(1)),
        ("bf16, nothing changed", BF16, usual[0], usual[0]),
        ("bf16, base constant, all changed", BF16, third, usual[0]),
        ("bf16, base constant, all changed alike", BF16, third, third + np.uint16(1)),
        ("bf16, base zero, all changed", BF16, np.zeros_like(third), usual[0]),
        ("bf16, base constant outside the window, all changed", BF16, np.full_like(third, 0x4348), usual[0]),
        ("f32, a tenth changed", F32, large(singles, np.uint32), large(singles + tenth, np.uint32)),
        ("f32, base constant, all changed alike", F32, single, single + np.uint32(0x12345)),
        ("f16, a tenth changed", F16, large(halves, np.uint16), large(halves + tenth, np.uint16)),
        ("e4m3, all changed", E4M3, large(bytes_, np.uint8), large(bytes_ + np.uint8(1), np.uint8)),
        ("e5m2, all changed", E5M2, large(bytes_, np.uint8), large(bytes_ + np.uint8(1), np.uint8)),
        ("e4m3, base constant, all changed", E4M3, np.full(size, 0x30, np.uint8), large(bytes_, np.uint8)),
    ]
    for what, format, base, tuned in cases:
        yield {"scan kernel over": what, "GB/s": kernel_rate(gpu, format, base, tuned, rounds)}


def read_rates(folder: Path, base: np.ndarray, rounds: int, piece: int = Room().side) -> dict[str, float]:
    """GB/s of one thread that fills a buffer, as the pipeline fills pinned memory, with what is in the page cache."""
    path, piece = folder / "side", min(piece, base.nbytes)
    path.write_bytes(base.tobytes())
    room, starts = np.empty(piece, np.uint8), range(0, base.nbytes - piece + 1, piece)

    def by_pread() -> None:
        with path.open("rb") as file:
            for start in starts:
                read_runs(np.array([[0, file.fileno(), start]]), 0, 8, room)

    def by_map() -> None:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            for start in starts:
                room[:] = view[start : start + piece]
                mapped.madvise(mmap.MADV_DONTNEED, start, piece)
            del view

    read = len(starts) * piece
    return {
        "pread into a buffer": read / seconds(by_pread, rounds) / 1e9,
        "copy from a map": read / seconds(by_map, rounds) / 1e9,
    }


def pipeline_rates(gpu: Gpu, folder: Path, base: np.ndarray, tuned: np.ndarray, rounds: int) -> dict[str, float]:
    """GB/s of one thread with the GPU and with the processor, from memory and from files in the page cache."""
    nbytes, worker = 2 * base.nbytes, CudaBackend(gpu, Room())
    backends: dict[str, Backend] = {"pipeline": worker, "CPU backend": CpuBackend()}
    check(worker, base, tuned)
    paths = folder / "base", folder / "tuned"
    for path, codes in zip(paths, (base, tuned), strict=True):
        path.write_bytes(codes.tobytes())
    memory = InMemory(base.view(np.uint8), tuned.view(np.uint8), base.size)
    rates = {}
    with paths[0].open("rb") as first, paths[1].open("rb") as second:
        for where, source in (("memory", memory), ("files", FromFiles(first, second, base.size))):
            for name, backend in backends.items():
                took = seconds(lambda: backend.scan(SCAN, source, Partial()), rounds)  # noqa: B023
                rates[f"{name}, one thread, from {where}"] = nbytes / took / 1e9
    return rates


def check(worker: Any, base: np.ndarray, tuned: np.ndarray) -> None:
    """Make sure that the GPU counts what the CPU counts.

    Raises
    ------
    SystemExit
        If it does not.
    """
    found = Partial(), Partial()
    source = InMemory(base.view(np.uint8), tuned.view(np.uint8), base.size)
    masks = [backend.scan(SCAN, source, one) for backend, one in zip((worker, CpuBackend()), found, strict=True)]
    same = [
        np.array_equal(getattr(found[0], name), getattr(found[1], name)) for name in ("counts", "weights", "deltas")
    ]
    if not (np.array_equal(*masks) and all(same)):
        raise SystemExit("the GPU and the CPU disagree")


def start_rows() -> Rows:
    """What happens once in a process, one after the other, so that each has its own time and memory."""
    from ckptdiff.measure.self_test import SELF_TESTED, self_test

    clock, before = time.perf_counter(), resident()

    def row(what: str) -> dict[str, Any]:
        nonlocal clock, before
        now, held = time.perf_counter(), resident()
        found = {"once": what, "seconds": now - clock, "resident MB more": (held - before) / 1e6}
        clock, before = time.perf_counter(), held
        return found

    gpu = choice.find_gpu(0)
    yield row("import CuPy, reach the driver")
    context = gpu.empty(1 << 20), gpu.stream()
    gpu.clear(*context)
    gpu.synchronize(gpu.record(context[1]))
    yield row("context, first allocation")
    pinned = gpu.pinned(64 << 20)
    pinned[:] = 1
    yield row("64 MiB of pinned memory, written")
    worker = CudaBackend(gpu, Room())
    room = f"{Room().host_bytes >> 20} MiB pinned, {Room().gpu_bytes >> 20} on the GPU"
    yield row(f"buffers of a thread ({room})")
    base, tuned = make_sides(64 << 10)
    source = InMemory(base.view(np.uint8), tuned.view(np.uint8), base.size)
    clock = time.perf_counter()
    for which in ("first", "second"):
        worker.scan(SCAN, source, Partial())
        yield row(f"{which} scan of bf16{', kernels compiled or loaded' * (which == 'first')}")
    wide = InMemory(np.repeat(base, 2).view(np.uint8), np.repeat(tuned, 2).view(np.uint8), base.size)
    for which in ("first", "second"):
        worker.scan(scan_of(F32), wide, Partial())
        yield row(f"{which} scan of f32{', kernels compiled or loaded' * (which == 'first')}")
    CudaBackend(gpu, Room())
    yield row("buffers of another thread")
    wrong = [found for names in SELF_TESTED if (found := self_test(worker, names))]
    yield row(f"self-test of {len(SELF_TESTED)} pairs of formats")
    if wrong:
        raise SystemExit(f"self-test: {'; '.join(wrong)}")


def whole_rows(options: argparse.Namespace) -> Rows:
    """Whole runs in one process: the first, with all that happens once, and those after it."""
    size = sum(path.stat().st_size for side in (options.base, options.tuned) for path in side.glob("*.safetensors"))
    took: list[float] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory(dir=options.base.parent) as folder:
        out = Path(folder, "run.h5") if options.masks else None
        for _ in range(options.rounds + 1):
            begun = time.perf_counter()
            ckptdiff.diff(
                options.base,
                options.tuned,
                out=out,
                mask="abs:1e-05" if options.masks else "none",
                device=options.device,
                threads=options.threads,
                max_memory=options.max_memory,
                listener=lambda event: notes.append(getattr(event, "text", "")),
            )
            took.append(time.perf_counter() - begun)
    again = statistics.median(took[1:])
    yield {
        "device": options.device,
        "masks": "yes" if options.masks else "no",
        "threads": options.threads or "default",
        "--max-memory": options.max_memory or "default",
        "first s": took[0],
        "again s": again,
        "GB/s": size / 1e9 / again,
        "peak MB": peak_resident() / 1e6,
        "threads planned": next(
            (found[1] for note in notes if (found := re.search(r", (\d+) threads, io", note))), None
        ),
    }


def rows_of(options: argparse.Namespace) -> Rows:
    """What was asked for."""
    if options.what == "start":
        yield from start_rows()
    elif options.what == "whole":
        yield from whole_rows(options)
    elif options.what == "kernels":
        yield from kernel_rows(choice.find_gpu(0), options.size, options.rounds)
    else:
        base, tuned = make_sides(options.size)
        with tempfile.TemporaryDirectory(dir=options.scratch) as name:
            asked = [lambda: read_rates(Path(name), base, options.rounds)]
            if options.what == "rates":
                gpu = choice.find_gpu(0)
                asked.insert(0, lambda: gpu_rates(gpu, base, tuned, options.rounds))
                asked.append(lambda: pipeline_rates(gpu, Path(name), base, tuned, options.rounds))
            for measure in asked:
                yield from ({"rate of": what, "GB/s": rate} for what, rate in measure().items())


def main() -> None:
    """Command line entry."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--figures", type=Path, help="keep the rows here as JSON, from the first one on")
    common.add_argument("--rounds", type=int, default=5, help="that are counted, after one that is not")
    parser = argparse.ArgumentParser(description="Time the CUDA backend beside the limits of GPU, bus and files.")
    asked = parser.add_subparsers(dest="what", required=True)
    for name in ("rates", "kernels", "reads", "start"):
        one = asked.add_parser(name, parents=[common])
        one.add_argument("--size", type=parse_size, default=512 << 20, help="bytes of a side (512MiB)")
        one.add_argument("--scratch", type=Path, help="where files are written")
    whole = asked.add_parser("whole", parents=[common])
    whole.add_argument("base", type=Path)
    whole.add_argument("tuned", type=Path)
    whole.add_argument("--device", default="cuda")
    whole.add_argument("--threads", type=int, default=0)
    whole.add_argument("--masks", action="store_true", help="write a run file with masks, not figures alone")
    whole.add_argument("--max-memory", default=0)
    options = parser.parse_args()
    rows = []
    for row in rows_of(options):
        rows.append(row)
        print(*(f"{value:.4g}" if isinstance(value, float) else value for value in row.values()), flush=True)
        if options.figures:
            write_json(options.figures, {"rows": rows})
    print(table(options.what, rows))


if __name__ == "__main__":
    main()
