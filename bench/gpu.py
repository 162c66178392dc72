"""How near the CUDA backend comes to what GPU, bus and files allow.

    python bench/gpu.py [--size BYTES] [--rounds N] [--json FILE]     # on a machine with a GPU
    python bench/gpu.py --reads                                       # how to fill pinned memory; needs none

Each side holds `size` bytes of bfloat16, a tenth of the coordinates moved. Rates count both sides. Figures are checked
against the CPU backend first. `GPU.md` says what to expect.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ckptdiff.backends.cpu import CpuWorker
from ckptdiff.backends.cuda.gpu import Gpu
from ckptdiff.backends.cuda.layout import RECORD, ROWS, TILE, TILE_RECORD, scan_settings
from ckptdiff.backends.cuda.slots import Room
from ckptdiff.backends.cuda.small import read_into
from ckptdiff.backends.cuda.worker import CudaWorker
from ckptdiff.backends.formats import FORMATS
from ckptdiff.backends.partial import BINS, Partial, Rule, Scan, Sum
from ckptdiff.backends.source import Extent, InMemory, Window

BF16 = FORMATS["bf16"]
SCAN = Scan(BF16, BF16, BF16, (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4), 1e-3, Rule.ABOVE, 1e-5, want_mask=True)
PIECE = 4 << 20


class FromFiles(InMemory):
    """A source that is read from two open files."""

    def __init__(self, base: Any, tuned: Any, numel: int) -> None:
        self.numel, self._files = numel, (base, tuned)

    def windows(self) -> Any:
        """Everything."""
        base, tuned = (Extent(file.fileno(), 0) for file in self._files)
        yield Window(0, self.numel, base, tuned)


def make_sides(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of Gaussian weights, and the same with a tenth moved by a few units of the last place."""
    rng = np.random.default_rng(0)
    base = ((rng.standard_normal(size // 2, np.float32) * 0.02).view(np.uint32) >> 16).astype(np.uint16)
    moved = rng.random(base.size, np.float32) < 0.1
    return base, base + moved * rng.integers(1, 4, base.size, np.uint16)


def seconds(act: Callable[[], object], rounds: int) -> float:
    """Median of several rounds after one that is not counted."""
    took = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        act()
        took.append(time.perf_counter() - begun)
    return statistics.median(took[1:])


def gpu_rates(gpu: Gpu, base: np.ndarray, tuned: np.ndarray, rounds: int) -> dict[str, float]:
    """GB/s of writing GPU memory, of copies up, and of the scan kernel over what is there already."""
    stream, nbytes = gpu.stream(), base.nbytes
    host, sides = gpu.pinned(nbytes), (gpu.empty(nbytes + 64), gpu.empty(nbytes + 64))
    tiles = np.zeros(-(-base.size // TILE), TILE_RECORD)
    starts = np.arange(tiles.size) * TILE
    tiles["base"], tiles["tuned"], tiles["mask"] = 2 * starts, 2 * starts, starts // 8
    tiles["numel"] = np.minimum(base.size - starts, TILE)
    listed, on_gpu = gpu.pinned(tiles.nbytes), gpu.empty(tiles.nbytes)
    listed[:] = tiles.view(np.uint8)
    gpu.upload(on_gpu, listed, stream)
    for codes, side in ((base, sides[0]), (tuned, sides[1])):
        host[:] = codes.view(np.uint8)
        gpu.upload(side, host, stream)
        gpu.synchronize(gpu.record(stream))
    out = gpu.empty(base.size // 8 + 8), gpu.empty(tiles.size * 8 * len(Sum)), gpu.empty(RECORD.itemsize)
    bins = gpu.empty(ROWS * BINS * 8)

    def finished(queue: Callable[[], None]) -> Callable[[], None]:
        def act() -> None:
            queue()
            gpu.synchronize(gpu.record(stream))

        return act

    def scan() -> None:
        arguments = [on_gpu, np.uint32(tiles.size), scan_settings(SCAN), *sides, *out, bins]
        gpu.launch((BF16, BF16, BF16), "scan", 2 * gpu.processors, arguments, stream)

    return {
        "GPU memory, written": nbytes / seconds(finished(lambda: gpu.clear(sides[0], stream)), rounds) / 1e9,
        "bus, up": nbytes / seconds(finished(lambda: gpu.upload(sides[0], host, stream)), rounds) / 1e9,
        "scan kernel": 2 * nbytes / seconds(finished(scan), rounds) / 1e9,
    }


def read_rates(folder: Path, base: np.ndarray, rounds: int) -> dict[str, float]:
    """GB/s of one thread that fills a buffer, as the pipeline fills pinned memory, with what is in the page cache."""
    path, room = folder / "side", np.empty(PIECE, np.uint8)
    path.write_bytes(base.tobytes())
    starts = range(0, base.nbytes - PIECE + 1, PIECE)

    def by_pread() -> None:
        with path.open("rb") as file:
            for start in starts:
                read_into(room, file.fileno(), start)

    def by_map() -> None:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            for start in starts:
                room[:] = view[start : start + PIECE]
                mapped.madvise(mmap.MADV_DONTNEED, start, PIECE)
            del view

    read = len(starts) * PIECE
    return {
        "pread into a buffer": read / seconds(by_pread, rounds) / 1e9,
        "copy from a map": read / seconds(by_map, rounds) / 1e9,
    }


def pipeline_rates(gpu: Gpu, folder: Path, base: np.ndarray, tuned: np.ndarray, rounds: int) -> dict[str, float]:
    """GB/s of the pipeline of one thread, from memory and from files in the page cache."""
    worker, nbytes = CudaWorker(gpu, Room()), 2 * base.nbytes
    check(worker, base, tuned)
    paths = folder / "base", folder / "tuned"
    for path, codes in zip(paths, (base, tuned), strict=True):
        path.write_bytes(codes.tobytes())
    memory = InMemory(base.view(np.uint8), tuned.view(np.uint8), base.size)
    rates = {"pipeline, from memory": nbytes / seconds(lambda: worker.scan(SCAN, memory, Partial()), rounds) / 1e9}
    with paths[0].open("rb") as first, paths[1].open("rb") as second:
        files = FromFiles(first, second, base.size)
        rates["pipeline, from files"] = nbytes / seconds(lambda: worker.scan(SCAN, files, Partial()), rounds) / 1e9
    return rates


def check(worker: CudaWorker, base: np.ndarray, tuned: np.ndarray) -> None:
    """Make sure that the GPU counts what the CPU counts.

    Raises
    ------
    SystemExit
        If it does not.
    """
    found = Partial(), Partial()
    source = InMemory(base.view(np.uint8), tuned.view(np.uint8), base.size)
    masks = [backend.scan(SCAN, source, one) for backend, one in zip((worker, CpuWorker()), found, strict=True)]
    same = [
        np.array_equal(getattr(found[0], name), getattr(found[1], name)) for name in ("counts", "weights", "deltas")
    ]
    if not (np.array_equal(*masks) and all(same)):
        raise SystemExit("the GPU and the CPU disagree")


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Time the CUDA backend beside the limits of GPU, bus and files.")
    parser.add_argument("--size", type=int, default=512 << 20, help="bytes of a side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reads", action="store_true", help="only the rates that need no GPU")
    parser.add_argument("--json", type=Path, help="also write the rates here")
    options = parser.parse_args()
    base, tuned = make_sides(options.size)
    with tempfile.TemporaryDirectory() as name:
        rates = read_rates(Path(name), base, options.rounds)
        if not options.reads:
            from ckptdiff.backends.cuda.choice import find_gpu

            gpu = find_gpu(0)
            rates |= gpu_rates(gpu, base, tuned, options.rounds)
            rates |= pipeline_rates(gpu, Path(name), base, tuned, options.rounds)
    for what, rate in rates.items():
        print(f"{what:24}{rate:8.2f} GB/s")
    if options.json:
        options.json.write_text(json.dumps(rates))


if __name__ == "__main__":
    main()
